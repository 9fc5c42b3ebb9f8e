"""The search against a plain per-candidate loop, on the same captured data of two blocks, in one process.

The plain loop is what PTQ4ViT's published code amounts to, written anew: for every round, quantizer and candidate it
quantizes, multiplies and sums the weighted error, image by image; at the block metric it runs the whole block and finds
the eliminated elements by numpy's selection, the fastest at hand. Its cost is linear in the candidates, so it is timed
on a few of them and scaled; choices are compared on a short grid that both search in full.

    python benchmarks/official_config.py --data-root COCO        # writes work_dirs/official_config/float.{py,pth}
    python benchmarks/calibration/search_speed.py work_dirs/official_config/float.py work_dirs/official_config/float.pth
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import BlockCall, partition
from apq_mmdet.calibration.calibrator import HELD, MEMORY_BUDGET, float_pass
from apq_mmdet.calibration.importance import capture_gradients
from apq_mmdet.calibration.objectives import order_statistic
from apq_mmdet.calibration.progress import Silent
from apq_mmdet.calibration.recipe import SearchConfig
from apq_mmdet.calibration.search import search_block
from apq_mmdet.calibration.store import CaptureStore, TensorStore
from apq_mmdet.calibration.units import UnitCalls, to_units, unit_module
from apq_mmdet.engine import command
from apq_mmdet.files import write_json
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers, quantizers_of
from apq_mmdet.layers.integer import float32_precision
from apq_mmdet.quantizers import QuantizerMode

BLOCKS = ("backbone.stages.0.blocks.1", "backbone.stages.2.blocks.1")
ROUNDS = 3


def build_parser(description: str) -> argparse.ArgumentParser:
    """What is searched, and where the figures go."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config")
    add("checkpoint")
    add("--images", type=int, default=2)
    add("--bits", type=int, default=4)
    add("--candidates", type=int, default=100, help="of the grid whose time is compared")
    add("--blocks", nargs="+", default=list(BLOCKS))
    add("--metrics", nargs="+", default=["module", "block"])
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--out", type=Path, default=Path("benchmarks/results/search_speed.json"))
    return parser


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = build_parser(__doc__)
    parser.add_argument("--short", type=int, default=12, help="candidates of the grid on which choices are compared")
    parser.add_argument("--plain-samples", type=int, default=3, help="candidates on which the plain loop is timed")
    return parser.parse_args()


def capture(args: argparse.Namespace) -> dict[str, tuple[nn.Module, list[BlockCall]]]:
    """Each block with its observed ranges, and its calls."""
    options = [args.config, args.checkpoint, "--work-dir", "work_dirs/search_speed", "--recipe", "apq", "--no-eval"]
    options += ["--w-bits", str(args.bits), "--a-bits", str(args.bits), "--num-calib", str(args.images)]
    parsed = command.build_parser().parse_args([*options, "--device", args.device])
    cfg = command.build_config(parsed)
    loop = Runner.from_cfg(cfg).build_test_loop(cfg.test_cfg)
    loop.model.eval()
    blocks = {name: block for name, block in partition(loop.model).items() if name in args.blocks}
    with CaptureStore(memory=2**34) as store, torch.no_grad():
        float_pass(loop.model, blocks, loop.images, loop.task, store)
        for quantizer in quantizers_of(loop.model):
            quantizer.set_range_factor(1.0)
        capture_gradients(loop.model, blocks, loop.images, loop.task, store)
        return {name: (blocks[name], list(store.take_calls(name))) for name in store.blocks}


def config(metric: str, candidates: int) -> SearchConfig:
    """Exact `apq` at the metric point; the module metric eliminates nothing, as in PTQ4ViT."""
    grids = {kind: (low, high, candidates) for kind, (low, high, _) in SearchConfig().grids.items()}
    objective = dict(type="hessian", eliminate=0.1 if metric == "block" else 0.0)
    return SearchConfig(metric=metric, objective=objective, grids=grids, rounds=ROUNDS)


def ours(block: nn.Module, calls: list[BlockCall], search: SearchConfig) -> tuple[dict[str, float], dict[str, float]]:
    """The chosen factors, and the seconds of each quantizer over all rounds."""
    units = UnitCalls(TensorStore(memory=MEMORY_BUDGET // HELD), "block")
    for call in calls:
        units.add(to_units(block, call))
    clock = Clock()
    with float32_precision(torch.device("cpu")):  # as in a calibration
        chosen = search_block(unit_module(block), units, search, clock)
    clock.quantizer("")
    return chosen, {name: s for name, s in clock.seconds.items() if name}


class Clock(Silent):
    """Adds up the seconds of each quantizer."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._name, self._since = "", time.perf_counter()

    def quantizer(self, name: str) -> None:
        """The search of another quantizer begins."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._since
        self._name, self._since = name, now


def layer_data(block: nn.Module, calls: list[BlockCall]) -> dict[QuantizedLayer, list[tuple[tuple, Tensor, Tensor]]]:
    """Float inputs, output and output gradient of every layer, image by image."""
    data: dict[QuantizedLayer, list] = {layer: [] for _, layer in quantized_layers(block)}
    for call in calls:
        seen: list[tuple[QuantizedLayer, tuple, Tensor]] = []

        def hook(layer: nn.Module, inputs: tuple, output: Tensor, seen: list = seen) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            seen.append((layer, inputs, output))
            return output.clone()

        handles = [layer.register_forward_hook(hook) for layer in data]
        with torch.enable_grad(), float_only(block):
            output = block(*call.args, **call.kwargs)
            grads = torch.autograd.grad(output, [o for *_, o in seen], call.grads[0])
        for handle in handles:
            handle.remove()
        for (layer, inputs, output), grad in zip(seen, grads, strict=True):
            data[layer].append((tuple(x.detach() for x in inputs), output.detach(), grad))
    return data


def plain_module_error(layer: QuantizedLayer, data: list) -> float:
    """Weighted squared error of a layer's output over all images."""
    total = 0.0
    for inputs, target, grad in data:
        total += float(((layer(*inputs) - target) * grad).square().sum(dtype=torch.float64))
    return total


def plain_block_error(block: nn.Module, calls: list[BlockCall], eliminate: float) -> float:
    """The same at the block's output, without the smallest errors of each image."""
    total = 0.0
    for call in calls:
        error = (block(*call.args, **call.kwargs) - call.outputs[0]).reshape(-1)
        cost = (error * call.grads[0].reshape(-1)).square()
        size = error.abs()
        threshold = order_statistic(size, int(eliminate * size.numel()))
        total += float((cost * (size >= threshold)).sum(dtype=torch.float64))
    return total


@torch.no_grad()
def plain(
    block: nn.Module, calls: list[BlockCall], search: SearchConfig, names: list[str], samples: int = 0
) -> tuple[dict[str, float], dict[str, float]]:
    """The plain loop over quantizers in the order ``names``: chosen factors and seconds.

    With ``samples`` only so many candidates of each are timed, at the last round's state, and scaled to all rounds.
    """
    layers = dict(quantized_layers(block))
    eliminate = search.objective["eliminate"]
    data = layer_data(block, calls) if search.metric == "module" else {}
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
        quantizer.mode = QuantizerMode.QUANTIZE if samples else QuantizerMode.FLOAT
    chosen: dict[str, float] = {}
    seconds: dict[str, float] = {}
    for _ in range(1 if samples else search.rounds):
        for name in names:
            layer, role = layers[name.rpartition(".")[0]], name.rpartition(".")[2]
            for quantizer in layer.quantizers.values():
                quantizer.mode = QuantizerMode.QUANTIZE
            grid = search.factors(layer.kind, layer.quantizers[role].min_factor)
            factors = grid[:: max(1, len(grid) // samples)][:samples] if samples else grid
            errors = []
            start = time.perf_counter()
            for factor in factors:
                layer.quantizers[role].set_range_factor(factor)
                if search.metric == "module":
                    errors.append(plain_module_error(layer, data[layer]))
                else:
                    errors.append(plain_block_error(block, calls, eliminate))
            scale = len(grid) * search.rounds / len(factors) if samples else 1.0
            seconds[name] = seconds.get(name, 0.0) + (time.perf_counter() - start) * scale
            chosen[name] = factors[errors.index(min(errors))]
            layer.quantizers[role].set_range_factor(1.0 if samples else chosen[name])
    return chosen, seconds


def compare(block: nn.Module, calls: list[BlockCall], metric: str, args: argparse.Namespace) -> dict[str, Any]:
    """Ratios of time by layer, and whether the choices agree."""
    short = config(metric, args.short)
    mine, _ = ours(block, calls, short)
    theirs, _ = plain(block, calls, short, list(mine))
    differ = {name: [mine[name], theirs[name]] for name in mine if mine[name] != theirs[name]}
    search = config(metric, args.candidates)
    _, fast = ours(block, calls, search)
    _, slow = plain(block, calls, search, list(mine), args.plain_samples)
    layers: dict[str, list[float]] = {}
    for name in fast:
        total = layers.setdefault(name.rpartition(".")[0], [0.0, 0.0])
        total[0] += fast[name]
        total[1] += slow[name]
    return {
        "metric": metric,
        "images": len(calls),
        "candidates": args.candidates,
        "choices_that_differ_on_the_short_grid": differ,
        "seconds": round(sum(fast.values()), 1),
        "plain_seconds_scaled": round(sum(slow.values()), 1),
        "times_faster": round(sum(slow.values()) / sum(fast.values()), 1),
        "times_faster_by_layer": {name: round(b / a, 1) for name, (a, b) in layers.items()},
    }


def main() -> None:
    """Measure every block and metric."""
    args = parse_args()
    results = []
    for name, (block, calls) in capture(args).items():
        for metric in args.metrics:
            found = compare(block, calls, metric, args)
            results.append({"block": name, "tokens": calls[0].outputs[0].shape[1], **found})
            print(json.dumps(results[-1], indent=1), flush=True)
    summary = {"bits": args.bits, "rounds": ROUNDS, "threads": torch.get_num_threads(), "results": results}
    write_json(args.out, summary)


if __name__ == "__main__":
    main()
