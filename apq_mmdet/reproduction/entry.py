"""A line of the table: a detector or row, what was measured, and what it is compared with."""

import math
from dataclasses import dataclass
from typing import Any

from apq_mmdet.reproduction.data import Data
from apq_mmdet.reproduction.prepare import IDS, Examined
from apq_mmdet.reproduction.published import Published, published, reference
from apq_mmdet.reproduction.rows import AP, Detector, Row

TOLERANCE = 0.1  # of float AP, in points


def ap_of(metrics: dict[str, float]) -> AP:
    """In percent; of a detector without a single detection mmdet gives none."""
    box, mask = (metrics.get(f"coco/{task}_mAP") for task in ("bbox", "segm"))
    return AP(*(None if value is None else round(100 * value, 6) for value in (box, mask)))


def is_reached(ours: AP, wanted: AP) -> bool:
    """Whether a float AP is within 0.1 of its reference, for boxes and for masks, where the reference has them."""
    pairs = [(a, b) for a, b in zip(ours, wanted, strict=True) if b is not None]
    return all(a is not None and _within(abs(a - b), TOLERANCE) for a, b in pairs)


def _within(value: float, limit: float) -> bool:
    return value < limit or math.isclose(value, limit, rel_tol=1e-6)  # 42.8 - 42.7 is a little more than 0.1


@dataclass
class Entry:
    """A line of the table.

    Attributes:
        state: waiting, done, or why there is no result.
        result: what ``execute`` returned, or None.
    """

    item: Detector | Row
    state: str = "waiting"
    result: dict[str, Any] | None = None

    def finish(self, result: dict[str, Any]) -> None:
        """Take over a result."""
        self.result = result
        self.state = "done" if self.ours.box is not None else "done, no detections"

    @property
    def detector(self) -> Detector:
        """The float detector that the line is about."""
        return self.item.detector if isinstance(self.item, Row) else self.item

    @property
    def ours(self) -> AP | None:
        """What was measured."""
        return ap_of(self.result["metrics"]) if self.result else None

    @property
    def published(self) -> Published | None:
        """What it is compared with."""
        return published(self.item) if isinstance(self.item, Row) else reference(self.item)

    def difference(self, data: Data) -> AP | None:
        """Ours less the published one, in points; None where either is absent, or the data is not COCO."""
        if self.ours is None or self.published is None or not data.is_coco:
            return None
        pairs = zip(self.ours, self.published.ap, strict=True)
        return AP(*(None if a is None or b is None else round(a - b, 6) for a, b in pairs))

    def is_off_reference(self, data: Data) -> bool:
        """Whether this is a float detector, measured on COCO, that misses its reference."""
        if isinstance(self.item, Row) or self.ours is None or self.published is None:
            return False
        return data.is_coco and not is_reached(self.ours, self.published.ap)

    def to_dict(self, examined: Examined) -> dict[str, Any]:
        """Plain containers: everything that the table tells of the line."""
        row = self.item if isinstance(self.item, Row) else None
        wanted, minus = self.published, self.difference(examined.data)
        checkpoint = examined.checkpoints[self.detector.name]
        return {
            "name": self.item.name,
            "model": row.model if row else self.item.name,
            "float_model": self.detector.name,
            "recipe": row and row.recipe,
            "bits": row.bits if row else "W32A32",
            "scope": row and row.scope,
            "num_calib": row and row.num_calib,
            "seed": row.seed if row else None,
            "published": wanted and {**wanted.ap._asdict(), "source": wanted.source},
            "ours": self.ours and self.ours._asdict(),
            "difference": minus and minus._asdict(),
            "state": self.state,
            **(self.result or {}),
            "checkpoint": {
                "file": checkpoint.path.name,
                "sha256": checkpoint.sha256,
                "verified": checkpoint.verified,
                "converted": checkpoint.converted,
            },
            "calibration_images": f"{row.name}/{IDS}" if row else None,
        }
