"""Top-1 accuracy of a small ViT and a small Swin of timm, float and quantized by several recipes.

    python benchmarks/classification.py                 # draws, trains, quantizes: what is done already is skipped
    python benchmarks/classification.py --recipes minmax --bits W4A4

What is done is told by its files in --work-dir alone: where a recipe or --epochs changed since, name another one.

The images are drawn: one shape of the demo set on noise, its place, size, angle and colours at random. The models are
timm's own, made small by its arguments. Writes benchmarks/results/classification.json.
"""

import argparse
import colorsys
import itertools
import json
import math
import os
import platform
import re
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from apq_mmdet.datasets.image_folder import ImageFolder
from apq_mmdet.datasets.shapes import CLASSES, SHAPES
from apq_mmdet.engine.classification import build_classifier, data_config, evaluate, make_transform
from apq_mmdet.engine.classification_command import main as quantize_cls
from apq_mmdet.files import tensor_bytes, write_atomic, write_json
from apq_mmdet.models.timm_import import import_timm

ROOT = Path(__file__).resolve().parents[1]
SIZE = 32  # pixels
SPLITS = {"train": 500, "val": 125}  # images of each class
RADIUS = (8, 14)  # pixels
HUE_SPREAD = 20  # degrees around the hue of a class
NOISE = 0.05  # standard deviation, of values in 0..1
MODELS = {
    "vit_small_patch16_224": dict(img_size=SIZE, patch_size=8, embed_dim=64, depth=4, num_heads=4),
    "swin_tiny_patch4_window7_224": dict(img_size=SIZE, window_size=4, embed_dim=32, depths=(2, 2), num_heads=(2, 4)),
}
BATCH, LEARNING_RATE = 64, 1.5e-3


# -- data -----------------------------------------------------------------------------------------------------


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """One BGR image [SIZE, SIZE, 3] with an object of a class."""
    radius, angle = rng.uniform(*RADIUS), rng.uniform(0, 2 * math.pi)
    centre = rng.uniform(0.7 * radius, SIZE - 0.7 * radius, 2)
    y, x = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    dx, dy = (x - centre[0]) / radius, (y - centre[1]) / radius
    u, v = math.cos(angle) * dx + math.sin(angle) * dy, math.cos(angle) * dy - math.sin(angle) * dx
    shape = SHAPES[label]
    cover = np.clip(0.5 - shape.outline(u, v) * radius, 0, 1)[..., None]
    blend = shape.texture(u, v, int(rng.integers(2**31)))[..., None]
    hue = (shape.hue + rng.normal(0, HUE_SPREAD)) / 360 % 1
    light = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.4, 1), rng.uniform(0.5, 1)))[::-1]
    dark = light * rng.uniform(0, 0.4)
    background = rng.uniform(0.2, 0.7) + rng.uniform(-0.1, 0.1, 3)
    image = background + cover * (dark + blend * (light - dark) - background)
    image = image + rng.normal(0, NOISE, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def draw_set(folder: Path) -> None:
    """Write ``train`` and ``val``, each with a folder for every class, unless they are there."""
    if (folder / "complete").exists():
        return
    for number, (split, images) in enumerate(SPLITS.items()):
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for index in range(images):
                image = draw(label, np.random.default_rng([number, label, index]))
                cv2.imwrite(str(folder / split / name / f"{index:04d}.png"), image)
    (folder / "complete").touch()


# -- training -------------------------------------------------------------------------------------------------


def augmented(x: Tensor) -> Tensor:
    """The images flipped and turned by quarters, one draw for the batch; x: [B, 3, H, W]."""
    turned = torch.rot90(x, int(torch.randint(4, ())), (2, 3))
    return turned.flip(3) if torch.rand(()) < 0.5 else turned


def train(model: nn.Module, images: ImageFolder, epochs: int) -> None:
    """AdamW, a short warm-up, then a cosine schedule."""
    x, labels = (torch.stack(part) for part in zip(*((x, torch.tensor(y)) for x, y in images), strict=True))
    steps = epochs * (len(x) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, steps, pct_start=0.1)
    model.train()
    for _ in tqdm(range(steps), desc="training", unit="step"):
        chosen = torch.randint(len(x), (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(augmented(x[chosen])), labels[chosen], label_smoothing=0.05).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def train_once(name: str, folder: Path, data: Path, epochs: int) -> None:
    """Train a model, unless what is known of it is there; written last."""
    known = folder / f"{name}.json"
    if known.exists():
        return
    torch.manual_seed(0)
    model = build_classifier(name, arguments(name))
    transform = make_transform(data_config(model, arguments(name)))
    start = time.perf_counter()
    train(model, ImageFolder(data / "train", transform), epochs)
    spent = time.perf_counter() - start
    metrics = evaluate(model, ImageFolder(data / "val", transform), 100, 0, f"float {name}")
    write_atomic(folder / f"{name}.pth", tensor_bytes({"state_dict": model.state_dict()}))
    row = {"epochs": epochs, "seconds": spent, "parameters": sum(p.numel() for p in model.parameters())}
    write_json(known, {**row, "float": metrics})


def arguments(name: str) -> dict[str, Any]:
    """timm's arguments of a small model."""
    return dict(MODELS[name], num_classes=len(CLASSES))


# -- quantization ---------------------------------------------------------------------------------------------


def quantize(name: str, recipe: str, bits: str, folder: Path, data: Path, num_calib: int) -> None:
    """One run of the tool, unless its report is there.

    Raises:
        RuntimeError: the tool failed.
    """
    work_dir = folder / f"{name}_{recipe}_{bits}_{num_calib}"
    w_bits, a_bits = re.fullmatch(r"W(\d)A(\d)", bits).groups()
    options = [name, "--checkpoint", folder / f"{name}.pth", "--calib-dir", data / "train", "--val-dir", data / "val"]
    options += ["--recipe", recipe, "--w-bits", w_bits, "--a-bits", a_bits, "--num-calib", num_calib]
    options += ["--work-dir", work_dir, "--workers", 0, "--resume", "--device", "cpu", "--model-args"]
    options += [f"{key}={_comma(value)}" for key, value in arguments(name).items()]
    if not (work_dir / "report.json").exists() and quantize_cls([str(option) for option in options]):
        raise RuntimeError(f"quantizing {name} with {recipe} at {bits} failed")


def row_of(report: Path) -> dict[str, Any]:
    """What the results keep of a run."""
    content = json.loads(report.read_text())
    return {
        "model": content["model"],
        "recipe": content["recipe"],
        "bits": "W{weight}A{activation}".format(**content["bits"]),
        **content["metrics"]["quantized"],
        "calibration_images": len(content["calibration_images"]),
        "calibration_seconds": content["calibration_seconds"],
        "checkpoint_bytes": content["sizes"]["quantized_checkpoint_bytes"],
    }


def _comma(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def bit_width(text: str) -> str:
    """A bit width of the command line, such as W4A4."""
    if not re.fullmatch(r"W[2-8]A[2-8]", text):
        raise argparse.ArgumentTypeError(f"expected W<2-8>A<2-8> such as W4A4, got {text!r}")
    return text


def results(folder: Path) -> dict[str, Any]:
    """All models and runs in the work dir."""
    models = {name: folder / f"{name}.json" for name in MODELS}
    return {
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "timm": import_timm().__version__,
        },
        "images": {"size": SIZE, "classes": len(CLASSES), **{k: v * len(CLASSES) for k, v in SPLITS.items()}},
        "models": {
            name: {"model_args": arguments(name), **json.loads(path.read_text())}
            for name, path in models.items()
            if path.exists()
        },
        "rows": [row_of(path) for path in sorted(folder.glob("*/report.json"))],
    }


def main() -> None:
    """Run what is missing and write all rows, again after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    add("--recipes", nargs="+", default=["minmax", "apq_plus", "apq"])
    add("--bits", nargs="+", type=bit_width, default=["W4A4", "W6A6", "W8A8", "W3A3"])
    add("--epochs", type=int, default=10, help="of training each model (default: 10)")
    add("--num-calib", type=int, default=8, help="calibration images (default: 8)")
    add("--work-dir", type=Path, default=ROOT / "work_dirs" / "classification")
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "classification.json")
    args = parser.parse_args()
    data = args.work_dir / "images"
    draw_set(data)
    for name in args.models:
        train_once(name, args.work_dir, data, args.epochs)
    for recipe, bits, name in itertools.product(args.recipes, args.bits, args.models):
        quantize(name, recipe, bits, args.work_dir, data, args.num_calib)
        write_json(args.out, results(args.work_dir))


if __name__ == "__main__":
    main()
