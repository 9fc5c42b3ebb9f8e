"""Small ViT and Swin classifiers of timm, drawn images to train them on, and their command line."""

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from apq_mmdet.datasets.image_folder import ImageFolder
from apq_mmdet.engine.classification import build_classifier, data_config, make_transform
from apq_mmdet.engine.classification_command import ClassificationRun, build_parser

CLASSES = ("circle", "cross", "square", "stripes")
SIZE = 32
VIT, SWIN = "vit_small_patch16_224", "swin_tiny_patch4_window7_224"
MODELS = {
    VIT: dict(img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    SWIN: dict(img_size=SIZE, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(1, 2)),
}


def arguments(name: str) -> dict:
    return dict(MODELS[name], num_classes=len(CLASSES))


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """One RGB image [SIZE, SIZE, 3]: a shape of random place, size and colour on noise."""
    image = rng.integers(0, 90, (SIZE, SIZE, 3)).astype(np.uint8)
    colour = rng.integers(120, 256, 3).tolist()
    radius = int(rng.integers(6, 11))
    x, y = rng.integers(radius, SIZE - radius, 2).tolist()
    corners = (x - radius, y - radius), (x + radius, y + radius)
    if label == 0:
        cv2.circle(image, (x, y), radius, colour, -1)
    elif label == 1:
        cv2.line(image, (x - radius, y), (x + radius, y), colour, 3)
        cv2.line(image, (x, y - radius), (x, y + radius), colour, 3)
    elif label == 2:
        cv2.rectangle(image, *corners, colour, 2)
    else:
        image[corners[0][1] : corners[1][1] : 4, corners[0][0] : corners[1][0]] = colour
    return image


def write_class_folders(root: Path) -> None:
    """Draw ``train`` and ``val``, each with a folder for every class."""
    rng = np.random.default_rng(0)
    for split, number in (("train", 60), ("val", 25)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                Image.fromarray(draw(label, rng)).save(folder / f"{index:03d}.png")


def train(name: str, root: Path) -> dict:
    """State of a model trained on the images in ``root``."""
    torch.manual_seed(0)
    model = build_classifier(name, arguments(name)).train()
    images = ImageFolder(root / "train", make_transform(data_config(model, arguments(name))))
    x, y = (torch.stack(part) for part in zip(*((x, torch.tensor(y)) for x, y in images), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, 120)
    for _ in range(120):
        chosen = torch.randint(len(x), (48,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


def options(folders: Path, classifiers: dict, work_dir: Path, *more, name: str = VIT) -> list[str]:
    """Of the command, for a small model; those given last count."""
    listed = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in arguments(name).items()}
    given = [name, "--checkpoint", classifiers[name], "--work-dir", work_dir, "--calib-dir", folders / "train"]
    given += ["--val-dir", folders / "val", "--num-calib", 4, "--workers", 0, "--device", "cpu", "--recipe", "minmax"]
    given += ["--model-args", *(f"{key}={value}" for key, value in listed.items()), *more]
    return [str(option) for option in given]


def made(*args, **kwargs) -> ClassificationRun:
    return ClassificationRun(build_parser().parse_args(options(*args, **kwargs)))
