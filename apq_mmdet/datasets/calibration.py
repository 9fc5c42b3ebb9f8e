"""Calibration images: drawn from a config's training set or a plain folder, through the config's test pipeline."""

import json
import os
import random
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from mmdet.registry import DATASETS
from mmengine.config import Config
from mmengine.dataset import BaseDataset, Compose
from mmengine.registry import init_default_scope

from apq_mmdet.errors import BadInputError
from apq_mmdet.registry import class_name

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


class CalibrationImages(Sequence):
    """Images for calibration, one sample of the test pipeline each; annotations are never read.

    Args:
        images: (id, path) of each image.
        pipeline: transforms of the test pipeline, as config dicts; those that load annotations are left out.

    Attributes:
        ids: the images' ids, in order.
        paths: their paths.
        metainfo: class names and so on of the data set they come from, or None.
    """

    def __init__(
        self,
        images: Sequence[tuple[Any, str]],
        pipeline: Sequence[dict[str, Any]],
        metainfo: dict[str, Any] | None = None,
    ) -> None:
        self.metainfo = metainfo
        self.ids = [image_id for image_id, _ in images]
        self.paths = [str(path) for _, path in images]
        steps = [step for step in pipeline if "Annotations" not in class_name(step["type"])]
        self._pipeline = Compose(steps)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The packed sample: ``inputs`` [3, H, W] and ``data_samples``."""
        return self._pipeline(
            dict(img_path=self.paths[index], img_id=self.ids[index], instances=[], flip=False, flip_direction=None)
        )

    def check(self, indices: Iterable[int] | None = None) -> None:
        """Raise BadInputError for the first path that does not exist, or of these images (None: all) cannot be read."""
        missing = next((path for path in self.paths if not os.path.isfile(path)), None)
        if missing is not None:
            raise BadInputError(f"calibration image {missing} does not exist{only_local(missing)}")
        for index in range(len(self)) if indices is None else indices:
            path = self.paths[index]
            try:
                sample = self[index]
            except Exception as error:
                raise BadInputError(f"calibration image {path} cannot be read: {error}") from error
            if sample is None:
                raise BadInputError(f"calibration image {path}: the test pipeline makes nothing of it")


def count_overlap(paths: Sequence[str], evaluated: Sequence[str], allowed: bool = False, remedy: str = "") -> int:
    """How many calibration images are among the ``evaluated`` paths; AP is then measured on seen images.

    Raises:
        BadInputError: there are some, and that is not ``allowed``; ``remedy`` ends its message.
    """
    shared = {os.path.realpath(p) for p in paths} & {os.path.realpath(p) for p in evaluated}
    if shared and not allowed:
        raise BadInputError(
            f"{len(shared)} of {len(paths)} calibration images are evaluated images, e.g. {min(shared)}; "
            f"calibrate on training images or on another folder{remedy}"
        )
    return len(shared)


def only_local(path: str) -> str:
    """What to say of a missing file that lies behind a file backend."""
    return "; images behind a file backend are not read, only local files" if "://" in path else ""


def innermost(dataset: dict[str, Any]) -> list[dict[str, Any]]:
    """The data sets inside wrappers such as RepeatDataset, MultiImageMixDataset, ConcatDataset."""
    if "dataset" in dataset:
        return innermost(dataset["dataset"])
    if "datasets" in dataset:
        return [inner for part in dataset["datasets"] for inner in innermost(part)]
    return [dataset]


def _enter_scope(cfg: Config) -> None:
    """Let names without a scope be mmdet's, where the config does not say whose they are."""
    init_default_scope(cfg.get("default_scope") or "mmdet")


def test_pipeline(cfg: Config) -> list[dict[str, Any]]:
    """The config's test pipeline, as dicts.

    Raises:
        BadInputError: the config has no test pipeline.
    """
    try:
        pipeline = innermost(cfg.test_dataloader.dataset)[0]["pipeline"]
    except (AttributeError, KeyError) as error:
        raise BadInputError("the config has no test_dataloader.dataset.pipeline") from error
    return _from_files(pipeline)


def read_from_files(cfg: Config) -> None:
    """Let the test pipelines of a config start from files, in place.

    In a model's ``cfg``, mmdet's ``inference_detector`` lets them start from arrays once it was given one.
    """
    loader = cfg.get("test_dataloader")
    for dataset in innermost(loader.get("dataset") or {}) if isinstance(loader, dict) else []:
        if isinstance(dataset, dict) and "pipeline" in dataset:
            dataset["pipeline"] = _from_files(dataset["pipeline"])


def _from_files(pipeline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A pipeline, with a first step that takes an array replaced by the one that reads a file."""
    match pipeline:
        case [{"type": "mmdet.LoadImageFromNDArray", **others}, *rest]:  # as it writes it
            return [{"type": "LoadImageFromFile", **others}, *rest]
    return pipeline


def distinct(paths: Iterable[str]) -> list[str]:
    """Paths without those that lead to the same file as an earlier one."""
    real_folder = cache(os.path.realpath)
    first: dict[str, str] = {}
    for path in paths:
        folder, name = os.path.split(path)
        linked = os.path.islink(path)  # all else is where its folder is
        first.setdefault(os.path.realpath(path) if linked else os.path.join(real_folder(folder), name), path)
    return list(first.values())


def choose(images: list[tuple[Any, str]], num: int, seed: int, where: str) -> list[tuple[Any, str]]:
    """``num`` images by a seeded rule: sorted by id and path, then drawn without replacement."""
    if num < 1:
        raise BadInputError(f"num_calib must be at least 1, got {num}")
    if len(images) < num:
        raise BadInputError(f"{num} calibration images asked for, {where} holds {len(images)}")
    ordered = sorted(images, key=lambda image: (str(type(image[0])), *image))
    return random.Random(seed).sample(ordered, num)


def calibration_from_folder(cfg: Config, folder: str, num: int, seed: int) -> CalibrationImages:
    """``num`` images of a folder (not its subfolders); ids are the file names.

    What several links lead to counts once.
    """
    if not os.path.isdir(folder):
        raise BadInputError(f"calibration folder {folder} does not exist")
    _enter_scope(cfg)
    paths = distinct(str(p) for p in sorted(Path(folder).iterdir()) if p.suffix.lower() in SUFFIXES and not p.is_dir())
    images = [(os.path.basename(path), path) for path in paths]
    return CalibrationImages(choose(images, num, seed, f"folder {folder} (without its subfolders)"), test_pipeline(cfg))


def training_images(cfg: Config) -> tuple[list[tuple[Any, str]], dict[str, Any]]:
    """Id and path of each image of the config's training sets, and the first set's metainfo.

    Raises:
        BadInputError: the config has no training set, or its annotations cannot be read.
    """
    _enter_scope(cfg)
    try:
        configs = innermost(cfg.train_dataloader.dataset)
    except (AttributeError, KeyError) as error:
        raise BadInputError("the config has no train_dataloader.dataset: give a folder with --calib-dir") from error
    if not configs:
        raise BadInputError("train_dataloader.dataset joins no data sets: give a folder with --calib-dir")
    sets = [_annotated_images(config) for config in configs]
    images: dict[str, tuple[Any, str]] = {}  # by path
    for info in (dataset.get_data_info(i) for dataset in sets for i in range(len(dataset))):
        path = info["img_path"]
        images.setdefault(path, (info.get("img_id", path), path))
    return [images[path] for path in distinct(images)], sets[0].metainfo


def _annotated_images(config: dict[str, Any]) -> BaseDataset:
    try:
        return DATASETS.build(dict(config, pipeline=[]))
    except Exception as error:  # annotations can be wrong in any way
        empty = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)  # what mmdet makes of it
        hint = "do the classes of its metainfo stand in its annotations? Or" if empty else "or"
        raise BadInputError(
            f"the training set cannot be read: {type(error).__name__}: {error}; {hint} give a folder with --calib-dir"
        ) from error


def calibration_from_config(cfg: Config, num: int, seed: int) -> CalibrationImages:
    """``num`` images of the config's training sets."""
    images, metainfo = training_images(cfg)
    return CalibrationImages(choose(images, num, seed, "the training set"), test_pipeline(cfg), metainfo)
