"""Write a copy of a Swin detector's checkpoint with the same float function and uneven channels.

Factors are moved from LayerNorms, queries, keys and values into the weights that follow, so that the copy detects
what the original detects, and is harder to quantize: channel ranges behind LayerNorms reach 40 times their median
(--peak, on the images that are measured), the figure that FQ-ViT (arXiv 2111.13824) reports for inputs of the norms of
pretrained vision transformers. The spread of all other channels (--spread) is a choice. Ranges are measured on images
of the config's training set.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from apq_mmdet.datasets.calibration import calibration_from_config, calibration_from_folder
from apq_mmdet.engine.checkpoint import load_float_weights
from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.float_config import build_model, config_files, read_config
from apq_mmdet.engine.options import check_seed, refuse_overwriting
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import check_target, safe_load, tensor_bytes, write_atomic
from apq_mmdet.models import detection_task
from apq_mmdet.models.stress import PEAK, SPREAD, Unevenness, check_factors, rescalings_by_name, stress

CLASS_KEYS = ("dataset_meta", "CLASSES", "PALETTE")  # of a checkpoint's meta: what mmdet takes class names from


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config", help="config of the float detector")
    add("checkpoint", help="its float checkpoint")
    add("out", type=Path, help="checkpoint to write, float32")
    add("--seed", type=int, default=0, help="of the factors and of the choice of images (default: 0)")
    add("--spread", type=float, default=SPREAD, help=f"spread of the log of each factor (default: {SPREAD})")
    add("--peak", type=float, default=PEAK, help=f"largest range behind a norm over the median (default: {PEAK:g})")
    add("--num-images", type=int, default=4, help="images to measure ranges on (default: 4)")
    add("--calib-dir", help="folder of such images (default: images of the config's training set)")
    return parser.parse_args(argv)


def stress_checkpoint(args: argparse.Namespace) -> list[Unevenness]:
    """Load, stress, write.

    Raises:
        BadInputError: a quantized config, no Swin blocks, a checkpoint of another architecture, no images,
            numbers out of their ranges, or an OUT that cannot be written.
    """
    check_seed(args.seed)
    check_factors(args.spread, args.peak)
    check_target(args.out)
    cfg = read_config(args.config)
    refuse_overwriting([args.out], [args.checkpoint, *config_files(cfg)], "OUT")
    if not isinstance(cfg.get("model"), dict):
        raise BadInputError(f"config {args.config} defines no model")
    if "quant" in cfg.model or "quant" in (cfg.model.get("backbone") or {}):
        raise BadInputError(f"config {args.config} is that of a quantized detector; give the float one")
    torch.manual_seed(args.seed)
    model = build_model(cfg).eval()
    rescalings_by_name(model)  # refused before the images are read
    meta = load_float_weights(model, args.checkpoint)
    if args.calib_dir:
        images = calibration_from_folder(cfg, args.calib_dir, args.num_images, args.seed)
    else:
        images = calibration_from_config(cfg, args.num_images, args.seed)
    images.check()
    task = detection_task(model)

    def run() -> None:
        for image in images:
            task.teacher(model, image)

    rows = stress(model, run, args.seed, args.spread, args.peak)
    state = _state_like(args.checkpoint, model.state_dict())
    kept = {key: meta[key] for key in CLASS_KEYS if key in meta}
    write_atomic(args.out, tensor_bytes({"meta": kept, "state_dict": state}))
    return rows


def _state_like(checkpoint: str, own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's state under the keys of the file."""
    content = safe_load(checkpoint)
    names = {key: key.removeprefix("module.") for key in content.get("state_dict", content)}
    return {key: own[name].clone() for key, name in names.items() if name in own}


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_args(argv)
    return exit_code_of(lambda: show(args, stress_checkpoint(args)))


def show(args: argparse.Namespace, rows: list[Unevenness]) -> None:
    """How uneven channels were and are."""
    print(f"{'largest channel over the median':<52}{'before':>8}{'after':>8}")
    for row in rows:
        print(f"{row.place + ', ' + row.role:<52}{row.before:>8.1f}{row.after:>8.1f}")
    print(f"{args.out} written")


if __name__ == "__main__":
    sys.exit(main())
