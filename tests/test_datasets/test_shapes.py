"""Outlines and textures of the demo classes."""

from __future__ import annotations

import numpy as np
import pytest

from apq_mmdet.datasets.shapes import CLASSES, SHAPES, ShapeClass, box, cross, disc, ring, star

GRID = tuple(np.mgrid[-1.5:1.5:61j, -1.5:1.5:61j].astype(np.float32))


def at(outline, u: float, v: float) -> float:
    return float(outline(np.float32([u]), np.float32([v]))[0])


def test_signed_distances_by_hand() -> None:
    assert at(disc, 0, 0) == pytest.approx(-1)
    assert at(box, 1, 0) == pytest.approx(0.2)
    assert at(ring, 0, 0) == pytest.approx(0.5)
    assert at(ring, 0.75, 0) == pytest.approx(-0.25)
    assert at(cross, 0.9, 0.9) == pytest.approx(0.54)
    assert at(star, 0, 0.99) * at(star, 0, -0.99) < 0  # one point up, a notch below


def test_class_names_are_distinct() -> None:
    assert len(set(CLASSES)) == len(SHAPES) >= 8


@pytest.mark.parametrize("shape", SHAPES, ids=CLASSES)
def test_shape_stays_in_the_unit_disc_and_texture_in_range(shape: ShapeClass) -> None:
    inside = shape.outline(*GRID) < 0
    assert 0.05 < inside.mean() < 0.4
    assert np.hypot(*GRID)[inside].max() < 1.15
    texture = shape.texture(*GRID, 3)
    assert texture.min() >= 0
    assert texture.max() <= 1
    assert texture[inside].std() > 0.1
