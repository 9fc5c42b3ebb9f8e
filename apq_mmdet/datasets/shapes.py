"""The object classes of the demo set: an outline (signed distance) and a texture each.

Both are functions of an object's own coordinates ``(u, v)``: the origin is its centre, its radius is 1, and
any rotation, scale or stretch has been undone. So a class looks the same at every pose, and masks need no
polygons.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float32]
Outline = Callable[[Field, Field], Field]
Texture = Callable[[Field, Field, int], Field]


def disc(u: Field, v: Field) -> Field:
    """Signed distance to the unit circle; negative inside, like every outline here."""
    return np.hypot(u, v) - 1


def box(u: Field, v: Field) -> Field:
    """Signed distance (Chebyshev) to an upright square that reaches the unit circle."""
    return np.maximum(np.abs(u), np.abs(v)) - 0.8


def polygon(sides: int) -> Outline:
    """Outline of a regular polygon with its corners on the unit circle."""
    angles = [(2 * k + 1) * math.pi / sides + math.pi / 2 for k in range(sides)]
    apothem = math.cos(math.pi / sides)

    def outline(u: Field, v: Field) -> Field:
        edges = [u * math.cos(a) + v * math.sin(a) for a in angles]
        return np.maximum.reduce(edges) - apothem

    return outline


def star(u: Field, v: Field) -> Field:
    """Approximate signed distance to a five-pointed star."""
    half = math.pi / 5
    angle = half - np.abs((np.arctan2(u, -v) % (2 * half)) - half)  # folded into one half of one point
    radius = np.hypot(u, v)
    notch = (0.45 * math.cos(half), 0.45 * math.sin(half))  # the inner corner between two points
    edge = (notch[0] - 1, notch[1])
    length = math.hypot(*edge)
    return ((radius * np.cos(angle) - 1) * edge[1] - radius * np.sin(angle) * edge[0]) / length


def ring(u: Field, v: Field) -> Field:
    """Signed distance to an annulus between 0.5 and 1."""
    return np.abs(np.hypot(u, v) - 0.75) - 0.25


def cross(u: Field, v: Field) -> Field:
    """Signed distance (Chebyshev) to a plus sign."""
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.95, b - 0.36), np.maximum(a - 0.36, b - 0.95))


def crescent(u: Field, v: Field) -> Field:
    """Signed distance to a disc with a smaller disc taken off one side."""
    return np.maximum(disc(u, v), 0.75 - np.hypot(u - 0.55, v))


def concentric(u: Field, v: Field, seed: int) -> Field:
    """Dark and light rings, like a target."""
    return (np.cos(np.hypot(u, v) * 4.5 * np.pi) > 0).astype(np.float32)


def checker(u: Field, v: Field, seed: int) -> Field:
    """Four by four chess board."""
    return ((np.floor(u * 2.5) + np.floor(v * 2.5)) % 2).astype(np.float32)


def stripes(u: Field, v: Field, seed: int) -> Field:
    """Bars along one axis."""
    return (np.sin(v * 4 * np.pi) > 0).astype(np.float32)


def glow(u: Field, v: Field, seed: int) -> Field:
    """A bright centre that fades outwards."""
    return np.clip(1.15 - 1.3 * np.hypot(u, v), 0, 1)


def segments(u: Field, v: Field, seed: int) -> Field:
    """Ten sectors, alternately dark and light."""
    return (np.sin(np.arctan2(v, u) * 5) > 0).astype(np.float32)


def dots(u: Field, v: Field, seed: int) -> Field:
    """Polka dots on a square grid."""
    x, y = (u * 2.8) % 1 - 0.5, (v * 2.8) % 1 - 0.5
    return (np.hypot(x, y) < 0.3).astype(np.float32)


def ramp(u: Field, v: Field, seed: int) -> Field:
    """A smooth slope from one end to the other."""
    return np.clip(0.5 + 0.5 * v, 0, 1)


def speckle(u: Field, v: Field, seed: int) -> Field:
    """Random cells, light or dark, fixed by ``seed``."""
    cells = np.random.default_rng(seed).random((16, 16), dtype=np.float32)
    index = [np.clip(((w + 1.5) / 3 * 16).astype(int), 0, 15) for w in (u, v)]
    return (cells[index[0], index[1]] > 0.5).astype(np.float32)


def flat(u: Field, v: Field, seed: int) -> Field:
    """One tone all over; no class has it."""
    return np.full_like(u, 0.7)


@dataclass(frozen=True)
class ShapeClass:
    """One class of the demo set.

    Attributes:
        name: category name.
        outline: signed distance of ``(u, v)``, in object radii.
        texture: blend between the object's two colours, 0..1, of ``(u, v, seed)``.
        hue: typical hue in degrees; an object's own hue scatters around it.
    """

    name: str
    outline: Outline
    texture: Texture
    hue: float


SHAPES: tuple[ShapeClass, ...] = (
    ShapeClass("target", disc, concentric, 0),
    ShapeClass("board", box, checker, 220),
    ShapeClass("tent", polygon(3), stripes, 45),
    ShapeClass("star", star, glow, 60),
    ShapeClass("ring", ring, segments, 130),
    ShapeClass("cross", cross, dots, 280),
    ShapeClass("moon", crescent, ramp, 190),
    ShapeClass("hexagon", polygon(6), speckle, 325),
)
CLASSES: tuple[str, ...] = tuple(shape.name for shape in SHAPES)
