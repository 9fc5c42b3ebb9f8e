"""A detector in memory: quantize it, and save it for mmdet's own tools."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdet.models.detectors import DeformableDETR
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS
from mmengine.config import Config

from apq_mmdet.calibration import Recipe, calibrate
from apq_mmdet.calibration.reports import CalibrationReport
from apq_mmdet.datasets.calibration import read_from_files
from apq_mmdet.engine.checkpoint import CHECKPOINT, save_quantized
from apq_mmdet.engine.options import refuse_foreign_config
from apq_mmdet.engine.quantized_config import (
    CONFIG,
    DEFAULT_RECIPE,
    RUN_CONFIG,
    quantized_config,
    standalone_config,
)
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import map_values, plain, write_atomic
from apq_mmdet.layers import quantize_model
from apq_mmdet.models.distillation import detection_task
from apq_mmdet.report import remove_report

# what mmdet's DETRs write into the configs of their parts, and refuse to find there when they are built again
DERIVED = {
    "bbox_head": ("share_pred_layer", "num_pred_layer", "as_two_stage"),
    "dn_cfg": ("num_classes", "embed_dims", "num_matching_queries"),
}


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
        BadInputError: the model has no config, one that no file can hold or from which nothing can be built, or is
            quantized already; no images or none of that form; unknown recipe or setting; heads that no task runs in
            scope 'detector'. No layer is quantized then, unless a grid of the recipe holds no range factor that a
            format allows, or blocks share a layer.
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
    cfg = quantized_config(_as_given(model), recipe, settings)
    _check_loadable(standalone_config(cfg, []))  # whatever cannot be written or read again is told now
    parsed = Recipe.from_dict(cfg.model.quant)
    task = detection_task(model, parsed.policy.scope)
    quantize_model(model, parsed.policy)
    report = calibrate(model, images, parsed, task, seed=seed)
    model.cfg = standalone_config(cfg, report.left_float)
    return report


def _as_given(model: BaseDetector) -> Config:
    """The config that a detector was built from."""
    cfg = copy.deepcopy(model.cfg)
    if isinstance(model, DeformableDETR):
        for part, keys in DERIVED.items():
            for key in keys:
                (cfg.model.get(part) or {}).pop(key, None)
    return cfg


def _check_loadable(cfg: Config) -> None:
    """Raise BadInputError where no detector can be built from a config."""
    try:
        MODELS.build(copy.deepcopy(cfg.model))
    except BadInputError:
        raise
    except Exception as error:  # constructors can fail in any way
        raise BadInputError(
            f"from the model's config no quantized detector can be built, as whoever loads its checkpoint has to: "
            f"{type(error).__name__}: {error}"
        ) from error


def save_detector(model: BaseDetector, folder: str | Path) -> None:
    """Write ``quantized.pth`` and ``config.py`` of a detector that ``quantize_detector`` quantized.

    What a run has left there of other weights, its report and its config, is removed.

    Raises:
        BadInputError: the model is not quantized, or the folder holds a ``config.py`` that is not of a run.
        CheckpointError: a quantizer is not calibrated.
    """
    if not hasattr(model, "quantization_table"):
        raise BadInputError(f"{type(model).__name__} is a float model: quantize it first, with quantize_detector")
    folder = Path(folder)
    refuse_foreign_config(folder, "save_detector")
    cfg = copy.deepcopy(model.cfg)
    read_from_files(cfg)  # the model may have been shown an array meanwhile
    text = cfg.pretty_text.encode()
    folder.mkdir(parents=True, exist_ok=True)
    remove_report(folder)
    (folder / RUN_CONFIG).unlink(missing_ok=True)
    save_quantized(model, folder / CHECKPOINT, {"dataset_meta": map_values(model.dataset_meta, plain)})
    write_atomic(folder / CONFIG, text)
