"""How hard a detector is to quantize: unevenness of channels, what attention maps lose, the tail of GELU, by block.

    python benchmarks/difficulty.py CONFIG CHECKPOINT [IMAGES] [--num-images 8]

CONFIG and CHECKPOINT are the float detector's; IMAGES is a folder, by default images of the config's training set are
taken. Sizes of channels are max - min with zero included behind a LayerNorm, and largest magnitudes of queries, keys
and values. Attention maps are looked at through unsigned k-bit codes on [0, largest value] of each head.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from mmengine.runner import Runner
from torch import Tensor, nn

from apq_mmdet.calibration.transforms import channel_extents, rescalings_of
from apq_mmdet.engine import command
from apq_mmdet.engine.ptq_loop import PTQLoop
from apq_mmdet.layers import float_only, quantized_layers

BITS = (4, 3)
SAMPLED = 2**16  # values of a GELU that are kept of each image for the percentile


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config")
    add("checkpoint")
    add("images", nargs="?", help="folder of images (default: images of the config's training set)")
    add("--num-images", type=int, default=8)
    add("--name", help="of the result, benchmarks/results/difficulty_NAME.json (default: the checkpoint's)")
    return parser.parse_args()


def build(args: argparse.Namespace) -> PTQLoop:
    """The detector with its float weights, and images; quantized layers give access to the attention maps."""
    options = [args.config, args.checkpoint, "--work-dir", "work_dirs/difficulty", "--recipe", "minmax", "--no-eval"]
    options += ["--num-calib", str(args.num_images), "--device", "cpu"]
    options += ["--calib-dir", args.images] if args.images else []
    parsed = command.build_parser().parse_args(options)
    command.choose_device(parsed.device)
    cfg = command.build_config(parsed)
    loop = Runner.from_cfg(cfg).build_test_loop(cfg.test_cfg)
    loop.model.eval()
    return loop


class Watch:
    """What is asked of the inputs of some modules, gathered over all images.

    Args:
        modules: by name.
        see: takes what was gathered of a module before (empty at first) and its new input, changes the former.
    """

    def __init__(self, modules: dict[str, nn.Module], see: Callable[[dict[str, Any], Tensor], None]) -> None:
        self.found: dict[str, dict[str, Any]] = {name: {} for name in modules}
        self._handles = [
            module.register_forward_pre_hook(lambda _, inputs, name=name: see(self.found[name], inputs[0]))
            for name, module in modules.items()
        ]

    def stop(self) -> dict[str, dict[str, Any]]:
        """What was found."""
        for handle in self._handles:
            handle.remove()
        return self.found


def see_gelu(found: dict[str, Any], x: Tensor) -> None:
    """Largest value, sums of magnitudes of both signs, and a sample."""
    flat = x.flatten()
    found["max"] = max(found.get("max", 0.0), float(flat.max()))
    found["negative"] = found.get("negative", 0.0) + float(flat.clamp(max=0).abs().sum(dtype=torch.float64))
    found["mass"] = found.get("mass", 0.0) + float(flat.abs().sum(dtype=torch.float64))
    found.setdefault("sample", []).append(flat[:: max(1, len(flat) // SAMPLED)].clone())


def see_largest(found: dict[str, Any], attention: Tensor) -> None:
    """Largest value of each head; attention: [windows, H, N, N]."""
    largest = attention.amax((0, 2, 3))  # [H]
    found["max"] = torch.maximum(found["max"], largest) if "max" in found else largest


def see_codes(found: dict[str, Any], attention: Tensor, largest: Tensor) -> None:
    """Mass in the top code and mass rounded to zero of unsigned k-bit codes on [0, largest] by head."""
    found["mass"] = found.get("mass", 0.0) + float(attention.sum(dtype=torch.float64))
    found["values"] = found.get("values", 0) + attention.numel()
    for bits in BITS:
        top = 2**bits - 1
        codes = (attention * (top / largest[:, None, None])).round()  # [windows, H, N, N]
        for name, chosen in (("top_mass", codes == top), ("zero_mass", codes == 0)):
            key = f"{name}_{bits}bit"
            found[key] = found.get(key, 0.0) + float((attention * chosen).sum(dtype=torch.float64))
        key = f"zero_values_{bits}bit"
        found[key] = found.get(key, 0) + int((codes == 0).sum())


def channel_rows(model: nn.Module, run: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Unevenness by block and tensor."""
    places = [(name, place) for name, block in model.named_modules() for place in rescalings_of(block)]
    rows: dict[str, dict[str, float]] = {}
    for (name, place), extent in zip(places, channel_extents([p for _, p in places], run), strict=True):
        for role, size in place.spans(*extent).items() if extent is not None else ():
            what = place.name if role == "input" else role
            row = rows.setdefault(name, {})
            row[f"{what}_max_over_median"] = float(size.max() / size.median())
            row[f"{what}_max_over_min"] = float(size.max() / size[size > 0].min())
    return rows


def measure(loop: PTQLoop) -> dict[str, dict[str, float]]:
    """All statistics by block."""
    model = loop.model

    def run() -> None:
        for image in loop.images:
            loop.task.teacher(model, image)

    attention = {name: q.quantizers["attention"] for name, q in quantized_layers(model) if "attention" in q.quantizers}
    gelus = {name: m for name, m in model.named_modules() if name.endswith(".ffn.layers.1")}
    with torch.no_grad(), float_only(model):
        first = [Watch(gelus, see_gelu), Watch(attention, see_largest)]
        rows = channel_rows(model, run)
        tails, largest = (watch.stop() for watch in first)
        second = [
            Watch({name: module}, partial(see_codes, largest=largest[name]["max"]))
            for name, module in attention.items()
        ]
        run()
        codes = {name: found for watch in second for name, found in watch.stop().items()}
    for name, found in tails.items():
        row = rows.setdefault(name.removesuffix(".ffn.layers.1"), {})
        sample = torch.cat(found["sample"]).sort().values
        row["gelu_max_over_p99.9"] = found["max"] / float(sample[int(0.999 * (len(sample) - 1))])
        row["gelu_negative_mass"] = found["negative"] / found["mass"]
    for name, found in codes.items():
        row = rows.setdefault(name.split(".attn.")[0], {})
        row["attention_max"] = float(largest[name]["max"].median())
        for key, value in found.items():
            if key not in ("mass", "values"):
                row[f"attention_{key}"] = value / found["values" if key.startswith("zero_values") else "mass"]
    return rows


def main() -> None:
    """Measure, write, print medians over the blocks."""
    args = parse_args()
    loop = build(args)
    rows = measure(loop)
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    medians = {key: median(row[key] for row in rows.values() if key in row) for key in keys}
    worst = {key: max(row[key] for row in rows.values() if key in row) for key in keys}
    out = Path(f"benchmarks/results/difficulty_{args.name or Path(args.checkpoint).stem}.json")
    result = {"config": args.config, "checkpoint": Path(args.checkpoint).name, "images": len(loop.images)}
    result |= {"median": medians, "largest": worst, "blocks": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(_rounded(result), indent=1) + "\n")
    print(f"{'over blocks':<32}{'median':>10}{'largest':>10}")
    for key in keys:
        print(f"{key:<32}{medians[key]:>10.3g}{worst[key]:>10.3g}")
    print(f"{out} written")


def _rounded(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    return float(f"{tree:.4g}") if isinstance(tree, float) else tree


if __name__ == "__main__":
    main()
