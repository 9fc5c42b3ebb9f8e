"""Rows of the table: the models of the project's metafiles, quantized ones with their calibration."""

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from apq_mmdet.checks import check_choice
from apq_mmdet.errors import BadInputError
from apq_mmdet.policy import check_bits

ROOT = Path(__file__).resolve().parents[2]
INDEX = ROOT / "model-index.yml"
TASKS = {"Object Detection": "box AP", "Instance Segmentation": "mask AP"}


class AP(NamedTuple):
    """Box and mask AP in percent; None where there is none."""

    box: float | None
    mask: float | None

    def __str__(self) -> str:
        return " / ".join("-" if value is None else f"{value:.1f}" for value in self)


@dataclass(frozen=True)
class Detector:
    """A float detector.

    Attributes:
        weights: address of its checkpoint.
        sha256: that the metafile gives of the checkpoint, or None.
        reference: the AP that its weights were published with, or None.
    """

    name: str
    config: Path
    weights: str
    sha256: str | None
    reference: AP | None


@dataclass(frozen=True)
class Row:
    """A quantized detector, calibrated on so many images that ``seed`` chose."""

    model: str
    config: Path
    detector: Detector
    recipe: str
    w_bits: int
    a_bits: int
    scope: str
    num_calib: int
    seed: int

    @property
    def name(self) -> str:
        """Tells the row from all others; names its folder."""
        return f"{self.model}_calib{self.num_calib}_seed{self.seed}"

    @property
    def bits(self) -> str:
        """Such as W4A4."""
        return f"W{self.w_bits}A{self.a_bits}"


@dataclass(frozen=True)
class Selection:
    """What a command reproduces, in the order of the index."""

    detectors: list[Detector]
    rows: list[Row]


def select(
    index: Path, patterns: Sequence[str] = ("*",), num_calib: Sequence[int] = (32,), seeds: Sequence[int] = (0,)
) -> Selection:
    """The models that ``patterns`` name, each quantized one for every number of images and seed.

    Args:
        index: OpenMMLab's ``model-index.yml``; paths in it and in its metafiles are relative to its folder.
        patterns: names of models, with the wildcards of the shell.

    Raises:
        BadInputError: the index is broken, or a pattern matches no model.
    """
    models = _read_models(index)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in models):
            near = difflib.get_close_matches(pattern, models, n=1, cutoff=0.0)
            raise BadInputError(f"--rows: {pattern!r} matches no model of {index}; the nearest is {near[0]!r}")
    wanted = [name for name in models if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    detectors: dict[str, Detector] = {}
    rows: list[Row] = []
    for name in wanted:
        float_name = _part(models[name], "Metadata").get("Float model", name)
        check_choice(float_name, models, f"'Float model' of {name}")
        detector = detectors.setdefault(float_name, _detector(models[float_name], index))
        if float_name != name:
            pairs = dict.fromkeys((num, seed) for num in num_calib for seed in seeds)  # each once
            rows += [_row(models[name], index, detector, num, seed) for num, seed in pairs]
    return Selection(list(detectors.values()), rows)


def _read_models(index: Path) -> dict[str, dict[str, Any]]:
    """Entries of ``Models`` of the index and of the metafiles that it imports, by name."""
    content = _read_yaml(index)
    entries = [*(content.get("Models") or [])]
    for path in content.get("Import") or []:
        entries += _read_yaml(index.parent / path).get("Models") or []
    if not entries:
        raise BadInputError(f"index {index} names no models")
    return {str(_entry(entry, "Name", index)): entry for entry in entries}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadInputError(f"index {path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise BadInputError(f"index {path} holds no 'Import' and no 'Models'")
    return content


def _entry(entry: dict[str, Any], key: str, where: Any) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise BadInputError(f"{where} lacks {key!r}: {entry}")
    return entry[key]


def _part(entry: dict[str, Any], key: str) -> dict[str, Any]:
    """A part that an entry may lack; one without content is None in YAML."""
    part = entry.get(key) or {}
    if not isinstance(part, dict):
        raise BadInputError(f"{entry['Name']}: {key!r} must hold keys and values, got {part!r}")
    return part


def _number(value: Any, key: str, where: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise BadInputError(f"{where}: {key!r} must be a number, got {value!r}") from error


def _config(entry: dict[str, Any], index: Path) -> Path:
    path = index.parent / _entry(entry, "Config", index)
    if not path.is_file():
        raise BadInputError(f"{entry['Name']}: config {path} does not exist")
    return path


def _detector(entry: dict[str, Any], index: Path) -> Detector:
    return Detector(
        name=entry["Name"],
        config=_config(entry, index),
        weights=_entry(entry, "Weights", index),
        sha256=_part(entry, "Metadata").get("Weights SHA256"),
        reference=_reference(entry),
    )


def _reference(entry: dict[str, Any]) -> AP | None:
    """The AP on COCO that a metafile gives."""
    found = {}
    for result in entry.get("Results") or []:
        task, dataset, metrics = (_entry(result, key, entry["Name"]) for key in ("Task", "Dataset", "Metrics"))
        if dataset == "COCO" and task in TASKS:
            found[TASKS[task]] = _number(_entry(metrics, TASKS[task], entry["Name"]), TASKS[task], entry["Name"])
    return AP(found.get("box AP"), found.get("mask AP")) if found else None


def _row(entry: dict[str, Any], index: Path, detector: Detector, num_calib: int, seed: int) -> Row:
    metadata, name = entry["Metadata"], entry["Name"]
    bits = [check_bits(_entry(metadata, f"{kind} bits", name), name) for kind in ("Weight", "Activation")]
    return Row(
        model=name,
        config=_config(entry, index),
        detector=detector,
        recipe=_entry(metadata, "Recipe", name),
        w_bits=bits[0],
        a_bits=bits[1],
        scope=_entry(metadata, "Scope", name),
        num_calib=num_calib,
        seed=seed,
    )
