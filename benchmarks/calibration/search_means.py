"""What each means of the exact search gives: the same search again without it, on the same captured data.

Each is switched off alone, so the ratios do not multiply to that of `search_speed.py`. The choices must not change.

    python benchmarks/official_config.py --data-root COCO        # writes work_dirs/official_config/float.{py,pth}
    python benchmarks/calibration/search_means.py work_dirs/official_config/float.py work_dirs/official_config/float.pth
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from search_speed import ROUNDS, build_parser, capture, config, ours
from torch import Tensor

from apq_mmdet.calibration import scoring, search, units
from apq_mmdet.calibration.search import Slot
from apq_mmdet.calibration.tape import Replays
from apq_mmdet.files import write_json
from apq_mmdet.layers.base import QuantizedLayer
from apq_mmdet.quantizers import QuantizerMode

EVERYTHING = 2**62


def _whole_runs(
    self: Replays, candidates: list[tuple[Tensor, ...]], key: object, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Any]:
    for parameters in candidates:
        self._quantizer.set_parameters(*parameters)
        yield self._module(*args, **kwargs)


def _join_with_values(layer: QuantizedLayer) -> int:
    changes = sum(quantizer.mode is QuantizerMode.FLOAT for quantizer in layer.quantizers.values())
    for quantizer in layer.quantizers.values():
        quantizer.mode = QuantizerMode.QUANTIZE
    return changes


# name -> context without it
MEANS: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "prefix": lambda: patch.object(Replays, "outputs", _whole_runs),
    "screening": lambda: patch.object(scoring, "_next_screen", lambda expected, masses: None),
    "integer products": lambda: patch.object(search, "_join", _join_with_values),
    "tiles": lambda: patch.object(units, "TILE_ELEMENTS", EVERYTHING),
    "fixpoint": lambda: patch.object(Slot, "searched_at", property(lambda slot: -1, lambda slot, value: None)),
}


def compare(block: torch.nn.Module, calls: list, metric: str, candidates: int) -> dict[str, Any]:
    """Seconds of the search with all means, and how many times longer it takes without each."""
    settings = config(metric, candidates)
    chosen, seconds = ours(block, calls, settings)
    total = sum(seconds.values())
    slower, differ = {}, []
    for name, without in MEANS.items():
        with without():
            found, others = ours(block, calls, settings)
        slower[name] = round(sum(others.values()) / total, 2)
        differ += [name] if found != chosen else []
    return {
        "metric": metric,
        "images": len(calls),
        "candidates": candidates,
        "seconds": round(total, 1),
        "times_slower_without": slower,
        "choices_that_differ_without": differ,
    }


def main() -> None:
    """Measure every block and metric."""
    parser = build_parser(__doc__)
    parser.set_defaults(images=1, candidates=24, out=Path("benchmarks/results/search_means.json"))
    args = parser.parse_args()
    results = []
    for name, (block, calls) in capture(args).items():
        for metric in args.metrics:
            results.append({"block": name, **compare(block, calls, metric, args.candidates)})
            print(json.dumps(results[-1], indent=1), flush=True)
    write_json(args.out, {"bits": args.bits, "rounds": ROUNDS, "threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    main()
