"""Published AP of detectors on COCO val2017, float and quantized, and which of our rows it stands beside."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from apq_mmdet.reproduction.rows import AP, ROOT, Detector, Row

NUMBERS = ROOT / "benchmarks" / "results" / "published_coco.json"
# the names under which the methods of our recipes were published
METHODS = {
    "apq": "APQ-ViT",
    "ptq4vit": "PTQ4ViT",
    "repq": "RepQ-ViT",
    "isvit": "I&S-ViT",
    "erq": "ERQ",
    "brecq": "BRECQ",
    "qdrop": "QDrop",
    "aphq": "APHQ-ViT",
    "fimaq": "FIMA-Q",
    "qwt": "RepQ-ViT + QwT",
}


@dataclass(frozen=True)
class Published:
    """A published AP and where it stands."""

    ap: AP
    source: str


def reference(detector: Detector) -> Published | None:
    """The float AP that a detector has to reach: that of its metafile, or else the published one."""
    if detector.reference:
        return Published(detector.reference, f"metafile of {detector.name}")
    return next((_published(entry) for entry in _entries(detector.name, "W32A32")), None)


def published(row: Row) -> Published | None:
    """What was published for a row's method, bits and detector, or None."""
    method = METHODS.get(row.recipe)
    entry = next((entry for entry in _entries(row.detector.name, row.bits) if entry["method"] == method), None)
    if entry is None:
        return None
    start = next((f", from float weights of {_ap(e)}" for e in _entries(row.detector.name, "W32A32")), "")
    return Published(_ap(entry), _published(entry).source + start)


def other_methods(detector: str, bits: str) -> Iterator[tuple[str, ...]]:
    """Detector, bits, method, AP and source of all that was published for these bits."""
    for entry in _entries(detector, bits):
        yield entry["detector"], bits, entry["method"], str(_ap(entry)), _source(entry)


def _entries(detector: str, bits: str) -> list[dict[str, Any]]:
    """Of a detector trained for 36 epochs; nothing was published for shorter training."""
    name = re.fullmatch(r"(.+_swin-\w+)-p4-w7_.*3x_coco", detector)
    rows = json.loads(NUMBERS.read_text())["rows"] if name else []
    return [row for row in rows if (row["detector"], row["bits"]) == (name[1], bits)]


def _published(entry: dict[str, Any]) -> Published:
    return Published(_ap(entry), f"{entry['method']}, {_source(entry)}")


def _ap(entry: dict[str, Any]) -> AP:
    return AP(entry["bbox"], entry["segm"])


def _source(entry: dict[str, Any]) -> str:
    return entry["source"] + (f" ({entry['note']})" if "note" in entry else "")
