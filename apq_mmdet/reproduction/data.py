"""The data root: its layout, its annotation files, how many images they list, and a config's way to it."""

import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from apq_mmdet.datasets.calibration import innermost
from apq_mmdet.errors import BadInputError

COCO_IMAGES = {"train2017": 118_287, "val2017": 5_000}
TRAIN, VAL = COCO_IMAGES


def annotation_file(split: str) -> str:
    """Its path in the data root."""
    return f"annotations/instances_{split}.json"


@dataclass(frozen=True)
class Split:
    """A part of a data set.

    Attributes:
        sha256: of the annotation file.
        files: name, width and height in pixels of each image that it lists.
    """

    sha256: str
    files: list[tuple[str, int, int]]


@dataclass(frozen=True)
class Data:
    """What a data root holds.

    Attributes:
        images: number of annotated images of each split.
        sha256: of each split's annotation file.
    """

    root: str
    images: dict[str, int]
    sha256: dict[str, str]

    @property
    def is_coco(self) -> bool:
        """Whether it is COCO 2017 by its numbers of images."""
        return self.images == COCO_IMAGES

    def __str__(self) -> str:
        counts = ", ".join(f"{number:,} images in {split}" for split, number in self.images.items())
        return f"COCO 2017 ({counts})" if self.is_coco else f"NOT COCO 2017: {counts}, of {self.root}"


def check_layout(root: Path) -> None:
    """Raise BadInputError with what the data root lacks."""
    for split in COCO_IMAGES:
        for path, exists in ((root / annotation_file(split), Path.is_file), (root / split, Path.is_dir)):
            if not exists(path):
                raise BadInputError(
                    f"data root {root} has no {path.relative_to(root)}; expected annotations/instances_train2017.json, "
                    f"annotations/instances_val2017.json, train2017/ and val2017/, as COCO 2017 unpacks"
                )


def read_split(root: Path, split: str) -> Split:
    """Read an annotation file.

    Raises:
        BadInputError: it is no annotation file, or lists no images.
    """
    path = root / annotation_file(split)
    content = path.read_bytes()
    try:
        annotations = json.loads(content)
        files = [(entry["file_name"], entry["width"], entry["height"]) for entry in annotations["images"]]
        if not (annotations["annotations"] and annotations["categories"] and files):
            raise ValueError("no images, no annotations or no categories in it")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInputError(
            f"annotation file {path} cannot be read: {type(error).__name__}: {error}; download it again"
        ) from error
    return Split(hashlib.sha256(content).hexdigest(), files)


def refuse_other_data(data: Data, accepted: bool) -> None:
    """Raise BadInputError for data that is not COCO 2017, unless that is ``accepted``."""
    if not data.is_coco and not accepted:
        expected = ", ".join(f"{number:,} in {split}" for split, number in COCO_IMAGES.items())
        raise BadInputError(
            f"this is {data}; COCO 2017 has {expected}. For a trial, --not-coco goes on; no number of it is compared "
            f"with a published one"
        )


def on_data(cfg: Config, root: Path) -> Config:
    """A copy of a config that reads its training and test images from a data root in COCO layout."""
    cfg = copy.deepcopy(cfg)
    for loader, split in ((cfg.train_dataloader, TRAIN), (cfg.test_dataloader, VAL)):
        for dataset in innermost(loader.dataset):
            dataset.update(data_root=f"{root}/", ann_file=annotation_file(split), data_prefix=dict(img=f"{split}/"))
    for evaluator in [cfg.test_evaluator] if isinstance(cfg.test_evaluator, dict) else cfg.test_evaluator:
        evaluator.ann_file = str(root / annotation_file(VAL))
    return cfg
