"""Products of integer codes in float32, on bfloat16 units and on int8 units: the linears of a Swin-T's blocks.

    python benchmarks/calibration/code_products.py [--tokens 5488] [--out benchmarks/results/code_products.json]

Each way starts from float32 codes and ends with float32 sums, as in a search; all give the same numbers, which is
checked. Times are the least of many on one thread.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from apq_mmdet.layers.integer import INT8_UNITS, linear_of_codes

CHANNELS = (96, 192, 384, 768)  # of the stages
LAYERS = {"qkv": (1, 3), "proj": (1, 1), "ffn.0": (1, 4), "ffn.1": (4, 1)}  # inputs and outputs, in channels
WAYS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "float32": F.linear,
    "bfloat16": lambda x, weight: linear_of_codes(x, weight, int8=False),
    "int8": lambda x, weight: linear_of_codes(x, weight, int8=True),
}


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=5488, help="rows of a product (default: 5488, 112 windows)")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/code_products.json"))
    return parser.parse_args()


def milliseconds(product: Callable[[], Tensor], repeats: int) -> float:
    """Least time of a product."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        product()
        times.append(time.perf_counter() - start)
    return round(1e3 * min(times), 3)


def main() -> None:
    """Every layer of every stage in all ways."""
    args = parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for channels in CHANNELS:
        for name, (inputs, outputs) in LAYERS.items():
            x = torch.randint(-15, 16, (args.tokens, inputs * channels)).float()
            weight = torch.randint(-15, 16, (outputs * channels, inputs * channels)).float()
            exact = x.long() @ weight.long().t()
            if not all(torch.equal(way(x, weight).long(), exact) for way in WAYS.values()):
                raise SystemExit(f"{name} of {channels} channels: products differ")
            times = {key: milliseconds(lambda w=way, x=x, y=weight: w(x, y), args.repeats) for key, way in WAYS.items()}
            speedups = {f"{key}_times_faster": round(times["float32"] / times[key], 1) for key in list(WAYS)[1:]}
            rows.append({"layer": name, "channels": channels, "milliseconds": times, **speedups})
            print(json.dumps(rows[-1]), flush=True)
    summary = {"int8_units": INT8_UNITS, "threads": 1, "tokens": args.tokens, "products": rows}
    args.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
