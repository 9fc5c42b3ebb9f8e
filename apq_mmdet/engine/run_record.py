"""What every run keeps beside its weights: what its bits depend on, and its report."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import apq_mmdet
from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.calibration.reports import CalibrationReport
from apq_mmdet.layers.convert import LayerRow
from apq_mmdet.versions import imported_versions

STATES = "calibration"  # folder in the work dir for finished blocks and captured activations


def sha256_of(paths: Iterable[str | Path]) -> str:
    """Hash of the bytes of all files, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(Path(path).read_bytes())
    return digest.hexdigest()


def calibration_conditions(images: Iterable[str | Path], device: str) -> dict[str, Any]:
    """What else the bits of a calibration depend on: image files, device, threads, versions of the stack."""
    return {
        "calibration_images_sha256": sha256_of(images),
        "device": device,
        "threads": torch.get_num_threads(),
        **imported_versions(),
    }


def run_report(
    *,
    recipe: Recipe,
    scope: str,
    asked: dict[str, Any],
    device: str,
    calibration: CalibrationReport,
    seconds: float,
    metrics: dict[str, dict[str, float] | None],
    float_bytes: int,
    checkpoint: Path,
    table: Sequence[LayerRow],
) -> dict[str, Any]:
    """``report.json``, but for what only one of the commands has to say.

    Args:
        asked: description of the run: weights, images, seed.
        seconds: of this run.
        metrics: of the 'float' and of the 'quantized' model, None where not measured.
        float_bytes: of the float checkpoint.
        checkpoint: the quantized one.
    """
    return {
        "recipe": recipe.name,
        "bits": {"weight": recipe.policy.w_bits, "activation": recipe.policy.a_bits},
        "scope": scope,
        **asked,
        "versions": {"apq_mmdet": apq_mmdet.__version__, **imported_versions()},
        "device": device,
        "threads": torch.get_num_threads(),
        "metrics": metrics,
        "calibration_seconds": calibration.seconds + calibration.earlier_seconds,
        "seconds": seconds + calibration.earlier_seconds,
        "blocks": [vars(block) for block in calibration.blocks],
        "left_float": calibration.left_float,
        "sizes": {
            "float_checkpoint_bytes": float_bytes,
            "quantized_checkpoint_bytes": checkpoint.stat().st_size,
        },
        "layers": [row.to_dict() for row in table],
    }
