"""Where the time of an exact block search goes, and how far it is from what operations and bytes allow.

    python benchmarks/calibration/time_shares.py CONFIG CHECKPOINT [--blocks NAME ...] [--images 1] [--candidates 8]

Times are torch's own per operator on one thread; "other" is Python and dispatch. The floor is the sum of the matrix
products at the rate of a large float32 product and of one read and one write of every operator's output at the rate
of a large copy, both measured in the same run.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from search_speed import BLOCKS, capture, config, ours
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from apq_mmdet.calibration.blocks import bytes_of

GEMM = ("mm", "_int_mm", "addmm", "bmm", "convolution", "mkldnn_convolution", "baddbmm")
# operations by the shapes of what torch's counter does not know
UNCOUNTED = {torch.ops.aten._int_mm: lambda left, right, **_: 2 * left[0] * left[1] * right[1]}
MOVEMENT = ("copy_", "cat", "index", "clone", "fill_", "zero_", "gather", "masked_scatter_", "index_select", "sort")


class BytesWritten(torch.utils._python_dispatch.TorchDispatchMode):
    """Adds up the size of every operator's outputs that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run the operator and look at what it wrote."""
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            self.total += bytes_of(result)
        return result


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config")
    add("checkpoint")
    add("--images", type=int, default=1)
    add("--bits", type=int, default=4)
    add("--candidates", type=int, default=8)
    add("--blocks", nargs="+", default=list(BLOCKS))
    add("--out", type=Path, default=Path("benchmarks/results/time_shares.json"))
    parser.set_defaults(device="cpu")  # whose rates are measured
    return parser.parse_args()


def rates() -> tuple[float, float]:
    """Operations per second of a large product, bytes per second of a large copy (read and write)."""
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    x, y = torch.randn(2**25), torch.empty(2**25)
    best = []
    for function, amount in ((lambda: torch.mm(a, b), 2 * 2048**3), (lambda: y.copy_(x), 2 * 4 * 2**25)):
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        best.append(amount / min(seconds))
    return best[0], best[1]


def main() -> None:
    """Profile each block."""
    args = parse_args()
    torch.set_num_threads(1)
    gemm_rate, copy_rate = rates()
    search = config("block", args.candidates)
    rows = []
    for name, (block, calls) in capture(args).items():
        start = time.perf_counter()
        ours(block, calls, search)
        wall = time.perf_counter() - start
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            ours(block, calls, search)
        parts = {"gemm": 0.0, "movement": 0.0, "elementwise": 0.0}
        for row in profiled.key_averages():
            operator = row.key.removeprefix("aten::")
            kind = "gemm" if operator in GEMM else "movement" if operator in MOVEMENT else "elementwise"
            parts[kind] += row.self_cpu_time_total / 1e6
        with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as flops, BytesWritten() as written:
            ours(block, calls, search)
        floor = flops.get_total_flops() / gemm_rate + 2 * written.total / copy_rate
        total = max(wall, sum(parts.values()))
        rows.append(
            {
                "block": name,
                "images": len(calls),
                "candidates": args.candidates,
                "seconds": round(wall, 1),
                "share": {kind: round(seconds / total, 2) for kind, seconds in parts.items()},
                "share_other": round(1 - sum(parts.values()) / total, 2),
                "gemm_operations": flops.get_total_flops(),
                "bytes_written": written.total,
                "times_the_floor": round(wall / floor, 2),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    rate = {"gemm_gops": round(gemm_rate / 1e9, 1), "copy_gb_per_s": round(copy_rate / 1e9, 1)}
    args.out.write_text(json.dumps({"threads": 1, **rate, "blocks": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
