"""All checks before anything long: data, images, checkpoints, configs; and what each row will take.

``examine`` and ``estimate`` run in a process of their own, whose memory (COCO's annotations, the models) goes with it.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pprint import pformat
from typing import Any

from mmengine.config import Config

import apq_mmdet
from apq_mmdet.datasets.calibration import choose, count_overlap, training_images
from apq_mmdet.engine.command import choose_device
from apq_mmdet.engine.float_config import config_files, read_config
from apq_mmdet.engine.options import OVERLAP_REMEDY, refuse_overwriting
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import write_atomic, write_json
from apq_mmdet.reproduction import checkpoints
from apq_mmdet.reproduction.checkpoints import Checkpoint
from apq_mmdet.reproduction.costs import Cost, check_config, fitting_checkpoint, float_cost, row_cost
from apq_mmdet.reproduction.data import TRAIN, VAL, Data, check_layout, on_data, read_split, refuse_other_data
from apq_mmdet.reproduction.images import check_images
from apq_mmdet.reproduction.rows import Detector, Row, Selection
from apq_mmdet.reproduction.settings import Settings

IDS = "calibration_images.json"  # beside every row's results
RULE = "the training set's images in the order of their ids; random.Random(seed).sample(images, number)"


@dataclass(frozen=True)
class Examined:
    """What was found.

    Attributes:
        data: the data root.
        sample: path of an evaluated image.
        checkpoints: of each float detector, by its name; in mmdet 3's keys.
        images: id and path of each calibration image of each row, by its name.
        conditions: what the result of each detector and row depends on, by its name.
    """

    data: Data
    sample: str
    checkpoints: dict[str, Checkpoint]
    images: dict[str, list[tuple[Any, str]]]
    conditions: dict[str, dict[str, Any]]


def check_quickly(selection: Selection, settings: Settings) -> None:
    """Raise BadInputError for what a look at the folders shows, and fetch checkpoints if told to."""
    check_layout(settings.data_root)
    if settings.download:
        for detector in selection.detectors:
            checkpoints.download(detector, settings.checkpoints)
    checkpoints.refuse_missing(selection.detectors, settings.checkpoints)


def examine(selection: Selection, settings: Settings) -> Examined:
    """Check data, images, checkpoints and configs; write each row's config.

    Raises:
        BadInputError: something is wrong; nothing has been run.
    """
    files = {d.name: checkpoints.verify(d, settings.checkpoints) for d in selection.detectors}
    items = (*selection.detectors, *selection.rows)
    read = {item.name: read_config(str(item.config)) for item in items}
    given = {file for cfg in read.values() for file in config_files(cfg)}
    refuse_overwriting([settings.config(name) for name in read], given, "--work-dir")
    configs: dict[str, Config] = {}
    digests: dict[str, str] = {}
    for item in items:
        configs[item.name], digests[item.name] = _config(item, read[item.name], settings)
    for detector in selection.detectors:
        folder, cfg = settings.work_dir / "converted", configs[detector.name]
        files[detector.name] = fitting_checkpoint(detector, cfg, files[detector.name], folder)
    print(f"checkpoints fit their configs: {len(files)}; reading the annotations", flush=True)
    train, val = (read_split(settings.data_root, split) for split in (TRAIN, VAL))
    data = Data(
        root=str(settings.data_root),
        images={TRAIN: len(train.files), VAL: len(val.files)},
        sha256={TRAIN: train.sha256, VAL: val.sha256},
    )
    refuse_other_data(data, settings.not_coco)
    check_images(settings.data_root / VAL, val.files, "evaluated images")
    images = _calibration_images(selection.rows, configs)
    used = list({path: (image_id, path) for chosen in images.values() for image_id, path in chosen}.values())
    names = {Path(path).name for _, path in used}
    check_images(settings.data_root / TRAIN, [file for file in train.files if file[0] in names], "calibration images")
    evaluated = [str(settings.data_root / VAL / name) for name, *_ in val.files]
    count_overlap([path for _, path in used], evaluated, settings.allow_overlap, OVERLAP_REMEDY)
    conditions = _conditions(selection, digests, files, data)
    return Examined(data, evaluated[0], files, images, conditions)


def _conditions(
    selection: Selection, digests: dict[str, str], files: dict[str, Checkpoint], data: Data
) -> dict[str, dict[str, Any]]:
    """What the result of each detector and row depends on, by its name."""

    def conditions(name: str, detector: Detector, **own: int) -> dict[str, Any]:
        return {
            "version": apq_mmdet.__version__,
            "config_sha256": digests[name],
            "checkpoint_sha256": files[detector.name].sha256,
            "annotations_sha256": data.sha256,
            **own,
        }

    found = {d.name: conditions(d.name, d) for d in selection.detectors}
    rows = {r.name: conditions(r.name, r.detector, num_calib=r.num_calib, seed=r.seed) for r in selection.rows}
    return {**found, **rows}


def estimate(selection: Selection, examined: Examined, settings: Settings) -> dict[str, Cost]:
    """What each detector and row takes, by its name; runs each float model on one image.

    Raises:
        BadInputError: a recipe or a checkpoint does not fit its detector.
    """
    choose_device(settings.device)
    evaluated, processes = examined.data.images[VAL], settings.processes or 1
    budget = int(settings.memory_budget * 2**30)
    costs = {}
    for detector in selection.detectors:
        cfg = read_config(str(settings.config(detector.name)))
        checkpoint = examined.checkpoints[detector.name]
        costs[detector.name] = float_cost(cfg, checkpoint, examined.sample, evaluated, processes)
    for row in selection.rows:
        cfg, checkpoint = read_config(str(settings.config(row.name))), examined.checkpoints[row.detector.name]
        costs[row.name] = row_cost(row, cfg, checkpoint, examined.images[row.name], evaluated, processes, budget)
    return costs


def write_ids(row: Row, images: Sequence[tuple[Any, str]], data: Data, path: Path) -> None:
    """Write down what a row calibrates on, and by which rule it was chosen."""
    content = {
        "rule": RULE,
        "number": row.num_calib,
        "seed": row.seed,
        "annotations_sha256": data.sha256[TRAIN],
        "images": [{"id": image_id, "file_name": Path(path).name} for image_id, path in images],
    }
    write_json(path, content)


def _config(item: Detector | Row, cfg: Config, settings: Settings) -> tuple[Config, str]:
    """The config of a detector or row on the data root, checked and written to the work dir; its own sha256."""
    own = json.dumps(cfg.to_dict(), sort_keys=True, default=str)
    try:
        cfg = on_data(cfg, settings.data_root)
    except (AttributeError, KeyError, TypeError) as error:
        raise BadInputError(f"config {item.config} has no COCO data sets to replace: {error}") from error
    if isinstance(item, Row):
        check_config(item, cfg)
    # not its pretty_text, which takes a second
    text = "".join(f"{key} = {pformat(value, width=120, sort_dicts=False)}\n" for key, value in cfg.to_dict().items())
    write_atomic(settings.config(item.name), text.encode())
    return cfg, hashlib.sha256(own.encode()).hexdigest()


def _calibration_images(rows: Sequence[Row], configs: dict[str, Config]) -> dict[str, list[tuple[Any, str]]]:
    """What each row will calibrate on; a training set is read once."""
    sets: dict[str, list[tuple[Any, str]]] = {}
    images = {}
    for row in rows:
        loader = configs[row.name].train_dataloader
        key = json.dumps({**loader.dataset, "pipeline": None}, sort_keys=True, default=str)
        if key not in sets:
            sets[key] = training_images(configs[row.name])[0]
        images[row.name] = choose(sets[key], row.num_calib, row.seed, "the training set")
    return images
