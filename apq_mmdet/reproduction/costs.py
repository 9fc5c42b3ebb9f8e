"""What a row takes: time, memory and disk, from one image; and the checks that need its model."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.device import get_device
from torch import nn

from apq_mmdet.calibration.blocks import bytes_of
from apq_mmdet.calibration.distributed import own_images
from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.datasets.calibration import CalibrationImages, test_pipeline
from apq_mmdet.engine.checkpoint import load_float_weights
from apq_mmdet.engine.float_config import build_model
from apq_mmdet.engine.foreign_checkpoints import NothingToConvertError, convert_file
from apq_mmdet.engine.plan import forward_seconds, make_plan
from apq_mmdet.errors import BadInputError
from apq_mmdet.models import detection_task
from apq_mmdet.reproduction.checkpoints import Checkpoint
from apq_mmdet.reproduction.rows import Detector, Row

LOG_BYTES = 32 * 2**20  # logs, configs and reports of a row, generously
RESULT_BYTES = 200 * 2**10  # that mmdet's evaluator writes for an image of 100 objects with masks, generously


@dataclass(frozen=True)
class Cost:
    """What a row takes.

    Attributes:
        calibration_seconds: about, by the plan of ``quantize_det.py --dry-run``; 0 for a float detector.
        evaluation_seconds: at the speed of the float forward on the first image; quantized models are slower.
        memory_bytes: weights and the budget of calibration, for each process.
        kept_bytes: that stay in the work dir.
        temporary_bytes: that the work dir holds beside them while the row runs.
        results_bytes: that the system's temporary folder holds while the row is evaluated.
        machine: on which the seconds were measured.
    """

    calibration_seconds: float
    evaluation_seconds: float
    memory_bytes: int
    kept_bytes: int
    temporary_bytes: int
    results_bytes: int
    machine: str

    def __str__(self) -> str:
        calibration, evaluation = (s / 60 for s in (self.calibration_seconds, self.evaluation_seconds))
        memory, kept, temporary = (b / 2**30 for b in (self.memory_bytes, self.kept_bytes, self.temporary_bytes))
        return (
            f"calibration about {calibration:.1f} min, evaluation at least {evaluation:.1f} min, "
            f"memory {memory:.1f} GiB, disk {kept:.2f} GiB and {temporary:.2f} GiB while it runs"
        )


def fitting_checkpoint(detector: Detector, cfg: Config, checkpoint: Checkpoint, folder: Path) -> Checkpoint:
    """The checkpoint, or its conversion in ``folder`` where it is not in mmdet 3's keys.

    Raises:
        BadInputError: neither fits the detector's config.
    """
    model = build_model(cfg)
    try:
        load_float_weights(model, str(checkpoint.path))
        return checkpoint
    except BadInputError as error:
        target = folder / checkpoint.path.name
        try:
            convert_file(str(checkpoint.path), target, str(detector.config))
        except NothingToConvertError:
            raise error from None
        except BadInputError as why:
            raise BadInputError(f"{error}. It cannot be converted either: {why}") from why
    return dataclasses.replace(checkpoint, path=target, converted=True)


def float_cost(cfg: Config, checkpoint: Checkpoint, image: str, evaluated: int, processes: int) -> Cost:
    """What the evaluation of a float detector takes.

    Args:
        cfg: of the float detector.
        image: path of the image to run on.
        evaluated: number of images.
        processes: that share them.
    """
    model = _loaded(cfg, checkpoint)
    task, sample = detection_task(model), CalibrationImages([(0, image)], test_pipeline(cfg))[0]
    model.eval()
    with torch.no_grad():
        task.teacher(model, sample)  # warms up
        seconds = forward_seconds(model, sample, task)
    size = bytes_of(model.state_dict())
    return Cost(0.0, evaluated / processes * seconds, size, LOG_BYTES, 0, evaluated * RESULT_BYTES, get_device())


def row_cost(
    row: Row,
    cfg: Config,
    checkpoint: Checkpoint,
    images: Sequence[tuple[Any, str]],
    evaluated: int,
    processes: int,
    memory_budget: int,
) -> Cost:
    """What the calibration and evaluation of a row take.

    Args:
        cfg: of the quantized detector.
        images: id and path of each calibration image.
        evaluated: number of images.
        processes: that share the images.
        memory_budget: bytes, for each process.

    Raises:
        BadInputError: the recipe or the checkpoint does not fit the detector.
    """
    model = _loaded(cfg, checkpoint)
    samples = CalibrationImages(images, test_pipeline(cfg))
    plan = make_plan(model, samples, detection_task(model, model.recipe.policy.scope), model.recipe, memory_budget)
    own = len(own_images(row.num_calib, 0, processes))  # of the first process, which has most
    shared = dataclasses.replace(plan, processes=processes, own=own)
    whole_blocks = plan.sizes.state_float if model.recipe.changes_weights else 0  # finished blocks, for --resume
    return Cost(
        calibration_seconds=shared.calibration_seconds,
        evaluation_seconds=evaluated / processes * plan.seconds,
        memory_bytes=plan.sizes.state_float + memory_budget,
        kept_bytes=plan.sizes.state_packed + whole_blocks + LOG_BYTES,
        temporary_bytes=plan.disk_bytes,  # of one process, which keeps no more in memory than several do
        results_bytes=evaluated * RESULT_BYTES,
        machine=plan.machine,
    )


def check_config(row: Row, cfg: Config) -> None:
    """Raise BadInputError if a row's config quantizes otherwise than its metafile says."""
    quant = cfg.get("model", {}).get("quant")
    if quant is None:
        raise BadInputError(f"{row.model}: config {row.config} holds no model.quant")
    recipe = Recipe.from_dict(quant.to_dict())
    found = (recipe.name, recipe.policy.w_bits, recipe.policy.a_bits, recipe.policy.scope)
    meant = (row.recipe, row.w_bits, row.a_bits, row.scope)
    if found != meant:
        raise BadInputError(
            f"{row.model}: its metafile says recipe, bits and scope {meant}, its config {row.config} {found}"
        )


def _loaded(cfg: Config, checkpoint: Checkpoint) -> nn.Module:
    model = build_model(cfg)
    load_float_weights(model, str(checkpoint.path))
    return model.to(get_device())
