"""A detector in memory: quantize it, and save it for mmdet's own tools."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.models.detectors.base import BaseDetector

from apq_mmdet.calibration import Recipe, calibrate
from apq_mmdet.calibration.reports import CalibrationReport
from apq_mmdet.datasets.calibration import read_from_files
from apq_mmdet.engine.checkpoint import CHECKPOINT, save_quantized
from apq_mmdet.engine.quantized_config import CONFIG, DEFAULT_RECIPE, quantized_config, standalone_config
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import map_values, plain, write_atomic
from apq_mmdet.layers import quantize_model
from apq_mmdet.models.distillation import detection_task


def quantize_detector(
    model: BaseDetector,
    images: Sequence[dict[str, Any]],
    recipe: str = DEFAULT_RECIPE,
    seed: int = 0,
    **settings: Any,
) -> CalibrationReport:
    """Quantize and calibrate a float detector, in place. The config in ``model.cfg`` becomes the quantized one.

    Args:
        model: what ``mmdet.apis.init_detector`` gives for a float config and checkpoint.
        images: packed samples of the test pipeline: ``inputs`` [3, H, W] and ``data_samples``.
        recipe: name, or path of a config that defines ``quant``.
        seed: of the random samplers of fast recipes.
        settings: keys of ``quant`` that replace the recipe's: ``w_bits``, ``a_bits``, ``scope``, ``overrides``.

    Raises:
        BadInputError: the model has no config, one that no file can hold, or is quantized already; no images or none
            of that form; unknown recipe or setting; heads that no task runs in scope 'detector'. No layer is quantized
            then, unless a grid of the recipe holds no range factor that a format allows, or blocks share a layer.
        CalibrationError: a quantizer that saw no data, a zero or non-finite gradient; the model is of no use then.
    """
    if not hasattr(model, "cfg"):
        raise BadInputError(f"{type(model).__name__} has no 'cfg': take a model of mmdet.apis.init_detector")
    if hasattr(model, "quantization_table"):
        raise BadInputError(f"{type(model).__name__} is quantized already; start from a float config and checkpoint")
    if not len(images):
        raise BadInputError("there are no calibration images")
    if not (isinstance(images[0], Mapping) and {"inputs", "data_samples"} <= set(images[0])):
        raise BadInputError(
            f"calibration images have to be packed samples of the test pipeline, dict(inputs=..., data_samples=...); "
            f"the first one is a {type(images[0]).__name__}"
        )
    cfg = quantized_config(model.cfg, recipe, settings)
    standalone_config(cfg, [])  # whatever cannot be written is told now
    parsed = Recipe.from_dict(cfg.model.quant)
    task = detection_task(model, parsed.policy.scope)
    quantize_model(model, parsed.policy)
    report = calibrate(model, images, parsed, task, seed=seed)
    model.cfg = standalone_config(cfg, report.left_float)
    return report


def save_detector(model: BaseDetector, folder: str | Path) -> None:
    """Write ``quantized.pth`` and ``config.py`` of a detector that ``quantize_detector`` quantized.

    Raises:
        BadInputError: the model is not quantized.
        CheckpointError: a quantizer is not calibrated.
    """
    if not hasattr(model, "quantization_table"):
        raise BadInputError(f"{type(model).__name__} is a float model: quantize it first, with quantize_detector")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_quantized(model, folder / CHECKPOINT, {"dataset_meta": map_values(model.dataset_meta, plain)})
    cfg = copy.deepcopy(model.cfg)
    read_from_files(cfg)  # the model may have been shown an array meanwhile
    write_atomic(folder / CONFIG, cfg.pretty_text.encode())
