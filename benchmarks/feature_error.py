"""How far the features of quantized detectors are from those of the float one, on val images: finer than AP.

    python benchmarks/feature_error.py CONFIG CHECKPOINT RUN [RUN ...] --out benchmarks/results/feature_error.json

CONFIG and CHECKPOINT are the float detector's, each RUN is a work dir of tools/quantize_det.py (those of
benchmarks/accuracy.py are in work_dirs/accuracy). The error is sum (q - f)^2 / sum f^2 over all elements of all levels
that the neck gives, and over all images; it differs by a few per cent between seeds where AP differs by half a point.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from mmdet.apis import init_detector
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from torch import Tensor, nn


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-val", type=int, default=100, help="the first so many val images (default: 100)")
    return parse_runs(parser, argv)


def parse_runs(parser: argparse.ArgumentParser, argv: Sequence[str] | None, *taken: str) -> argparse.Namespace:
    """Command line with a float detector, finished runs that are told by their names, and a file for the results.

    Args:
        parser: with the options that are a benchmark's own.
        argv: what to parse; None for the process' own.
        taken: names that no run may have.
    """
    add = parser.add_argument
    add("config")
    add("checkpoint")
    add("runs", nargs="+", type=Path, metavar="RUN")
    add("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    names = [*taken, *(run.resolve().name for run in args.runs)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        parser.error(f"two runs are called {twice}: results are told by the name of a run's folder")
    return args


def val_images(config: str, number: int) -> list[dict[str, Any]]:
    """The first val images as the config's loader gives them, one a batch."""
    init_default_scope("mmdet")
    loader = Config.fromfile(config).test_dataloader
    loader.update(batch_size=1, num_workers=0, persistent_workers=False)
    loader.dataset.indices = number
    return list(Runner.build_dataloader(loader))


@torch.no_grad()
def features(model: nn.Module, images: Sequence[dict[str, Any]]) -> list[list[Tensor]]:
    """What backbone and neck make of each image, by level, [1, C, H, W]."""
    return [list(model.extract_feat(model.data_preprocessor(image)["inputs"])) for image in images]


def relative_error(found: list[list[Tensor]], wanted: list[list[Tensor]]) -> float:
    """sum (q - f)^2 / sum f^2 over images, levels and elements."""
    error, energy = 0.0, 0.0
    for levels, float_levels in zip(found, wanted, strict=True):
        for q, f in zip(levels, float_levels, strict=True):
            error += float((q - f).square().sum(dtype=torch.float64))
            energy += float(f.square().sum(dtype=torch.float64))
    return error / energy


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every run; the best first."""
    args = parse_args(argv)
    images = val_images(args.config, args.num_val)
    wanted = features(init_detector(args.config, args.checkpoint, device="cpu"), images)
    errors = {}
    for run in args.runs:
        model = init_detector(str(run / "config.py"), str(run / "quantized.pth"), device="cpu")
        errors[run.resolve().name] = float(f"{relative_error(features(model, images), wanted):.3g}")
        print(f"{errors[run.resolve().name]:.4f}  {run}", flush=True)
    ranked = dict(sorted(errors.items(), key=lambda pair: pair[1]))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"images": len(images), "relative_error": ranked}, indent=1) + "\n")


if __name__ == "__main__":
    main()
