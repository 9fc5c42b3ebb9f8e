"""Writes the demo set to disk as a COCO instance segmentation data set.

Image ``i`` of a split depends on ``(seed, split, i)`` alone, so the files are the same for any number of
workers.
"""

import json
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle
from tqdm import tqdm

from apq_mmdet.datasets.scene import Image, Instance, draw_scene
from apq_mmdet.datasets.shapes import CLASSES
from apq_mmdet.errors import BadInputError

SPLITS = ("train", "val")
STAMP = "demo.json"  # tells which demo set a folder holds
KEYS = {"format", "seed", "train", "val"}  # of the stamp
JPEG_QUALITY = 95
FORMAT = 1  # raise when drawing changes: older data on disk is then not taken for complete


def demo_image(seed: int, split: str, index: int) -> tuple[Image, list[Instance]]:
    """Draw image `index` of a split; the BGR image (H, W, 3) and its instances."""
    return draw_scene(np.random.default_rng([seed, SPLITS.index(split), index]))


def annotation(instance: Instance) -> dict[str, Any]:
    """COCO fields of one instance: compressed RLE mask and (x, y, width, height) of what is visible."""
    code = rle.encode(np.asfortranarray(instance.mask, dtype=np.uint8))
    return {
        "category_id": instance.label + 1,
        "bbox": [float(x) for x in rle.toBbox(code)],
        "area": int(rle.area(code)),
        "iscrowd": 0,
        "segmentation": {"size": [int(n) for n in code["size"]], "counts": code["counts"].decode()},
    }


def write_demo_set(out: Path, seed: int, num_train: int, num_val: int, workers: int = 1) -> bool:
    """Write both splits under `out`, or leave it as it is where this very set is already complete.

    Args:
        out: target folder; gets ``annotations/``, ``train/`` and ``val/``. Another set there is
            replaced once the new one is complete.
        seed: determines every image.
        num_train: images of the train split.
        num_val: images of the val split.
        workers: processes that draw.

    Returns:
        Whether anything was written.

    Raises:
        BadInputError: ``out`` holds anything but a demo set.
    """
    out = out.resolve()  # a link is followed, and "." has a name
    stamp = {"format": FORMAT, "seed": seed, "train": num_train, "val": num_val}
    if is_complete(out, stamp):
        return False
    if out.exists() and not (out.is_dir() and _holds_demo_set(out)):
        raise BadInputError(f"{out} holds something other than a demo set; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as folder:
        temporary = Path(folder) / out.name
        for split, number in (("train", num_train), ("val", num_val)):
            _write_split(temporary, split, number, seed, workers)
        (temporary / STAMP).write_text(json.dumps(stamp))
        if out.exists():
            out.rename(Path(folder) / f"{out.name}.before")  # goes with the temporary folder
        temporary.rename(out)
    return True


def _holds_demo_set(out: Path) -> bool:
    """Whether all that a folder holds is a demo set; so it is where there is nothing."""
    names = {path.name for path in out.iterdir()}
    if not names:
        return True
    return STAMP in names and names <= {STAMP, "annotations", "train", "val"} and _stamp_of(out).keys() == KEYS


def _stamp_of(out: Path) -> dict[str, Any]:
    """What the stamp of a folder says; empty where it is none of ours."""
    try:
        stamp = json.loads((out / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def is_complete(out: Path, stamp: dict[str, int]) -> bool:
    """Whether `out` holds the set that `stamp` describes; the stamp is written last."""
    return _stamp_of(out) == stamp


def _write_split(root: Path, split: str, number: int, seed: int, workers: int) -> None:
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, (image, instances) in enumerate(_drawn(root / split, split, number, seed, workers)):
        images.append(dict(id=index + 1, **image))
        annotations += [dict(id=len(annotations) + k + 1, image_id=index + 1, **a) for k, a in enumerate(instances)]
    content = {
        "info": {"description": f"apq_mmdet demo set, seed {seed}"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k + 1, "name": name} for k, name in enumerate(CLASSES)],
    }
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _drawn(
    folder: Path, split: str, number: int, seed: int, workers: int
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Entries of all images of a split, in order, with a progress bar."""
    draw = partial(_draw_file, folder, split, seed)
    bar = partial(tqdm, total=number, desc=f"drawing {split}", unit="image")
    if workers <= 1:
        yield from bar(map(draw, range(number)))
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from bar(pool.map(draw, range(number), chunksize=16))


def _draw_file(folder: Path, split: str, seed: int, index: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Draw and save one image; its COCO entry without id, and its annotations without ids."""
    cv2.setNumThreads(1)
    image, instances = demo_image(seed, split, index)
    name = f"{index:06d}.jpg"
    if not cv2.imwrite(str(folder / name), image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]):
        raise OSError(f"could not write {folder / name}")
    entry = {"file_name": name, "height": image.shape[0], "width": image.shape[1]}
    return entry, [annotation(i) for i in instances]
