"""Draws one image of the demo set: clutter, distractors and overlapping objects with their masks."""

import colorsys
import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from apq_mmdet.datasets.shapes import SHAPES, Field, Outline, Texture, flat

Image = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Rng = np.random.Generator

LONG_SIDE = 224
SHORT_SIDE = (176, 224)
OBJECTS = (3, 6)
DISTRACTORS = (1, 3)
RADII = ((14, 20), (20, 50), (60, 95))  # pixels; one bin per COCO size, roughly
RADIUS_WEIGHTS = (0.25, 0.47, 0.28)
MIN_VISIBLE = 0.6  # a placement that hides more of any object than this leaves is tried again elsewhere
PLACEMENTS = 10
MIN_AREA = 120  # pixels; what shows less is not annotated


@dataclass(frozen=True)
class Pose:
    """Centre and radius in pixels, angle in radians, and the ratio of the two half axes."""

    x: float
    y: float
    radius: float
    angle: float
    stretch: float


@dataclass(frozen=True)
class Instance:
    """What is annotated of one object: its class index and the visible part of its mask, shape (H, W)."""

    label: int
    mask: Mask


@dataclass(frozen=True)
class Sprite:
    """One drawn thing before composition: BGR colours (H, W, 3) in 0..1 and coverage (H, W) in 0..1."""

    colour: Field
    alpha: Field


def draw_scene(rng: Rng) -> tuple[Image, list[Instance]]:
    """Draw one image.

    Args:
        rng: the only source of randomness.

    Returns:
        The BGR image, shape (H, W, 3), and its visible instances in painting order.
    """
    height, width = _size(rng)
    canvas = _background(height, width, rng)
    visible: list[Instance] = []
    full: list[int] = []
    for label, radius in _cast(rng):
        sprite = _place(label, radius, visible, full, (height, width), rng)
        if sprite is None:
            continue
        canvas += sprite.alpha[..., None] * (sprite.colour - canvas)
        covered = sprite.alpha >= 0.5
        visible = [Instance(i.label, i.mask & ~covered) for i in visible]
        visible.append(Instance(label, covered))
        full.append(int(covered.sum()))
    kept = [i for i in visible if i.label >= 0 and i.mask.sum() >= MIN_AREA]
    return _develop(canvas, rng), kept


def _size(rng: Rng) -> tuple[int, int]:
    short = int(rng.integers(SHORT_SIDE[0], SHORT_SIDE[1] + 1))
    return (LONG_SIDE, short) if rng.random() < 0.5 else (short, LONG_SIDE)


def _cast(rng: Rng) -> list[tuple[int, float]]:
    """Labels (-1: a distractor) and radii, roughly from large to small so that little things stay visible."""
    objects = int(rng.integers(OBJECTS[0], OBJECTS[1] + 1))
    distractors = int(rng.integers(DISTRACTORS[0], DISTRACTORS[1] + 1))
    labels = [int(i) for i in rng.integers(len(SHAPES), size=objects)] + [-1] * distractors
    bins = rng.choice(len(RADII), size=len(labels), p=RADIUS_WEIGHTS)
    radii = [float(np.exp(rng.uniform(*np.log(RADII[b])))) for b in bins]
    order = np.argsort([-r * np.exp(rng.normal(0, 0.3)) for r in radii])
    return [(labels[i], radii[i] if labels[i] >= 0 else radii[i] * 0.6) for i in order]


def _place(
    label: int, radius: float, visible: list[Instance], full: list[int], size: tuple[int, int], rng: Rng
) -> Sprite | None:
    """Draw one object where it hides no earlier one too much; None if no such place was found."""
    outline = _blob(rng) if label < 0 else SHAPES[label].outline
    height, width = size
    margin = 0.6 * radius
    for _ in range(PLACEMENTS):
        pose = Pose(
            x=rng.uniform(margin, max(width - margin, margin + 1)),
            y=rng.uniform(margin, max(height - margin, margin + 1)),
            radius=radius,
            angle=rng.uniform(0, 2 * math.pi),
            stretch=float(np.exp(rng.uniform(-0.25, 0.25))),
        )
        u, v = _local(pose, size)
        alpha = np.clip(0.5 - outline(u, v) * radius, 0, 1).astype(np.float32)
        covered = alpha >= 0.5
        left = [int((i.mask & ~covered).sum()) for i in visible]
        if all(i.label < 0 or a >= MIN_VISIBLE * f for i, a, f in zip(visible, left, full, strict=True)):
            return Sprite(_paint(label, u, v, rng), alpha)
    return None


def _local(pose: Pose, size: tuple[int, int]) -> tuple[Field, Field]:
    """Object coordinates (u, v) of every pixel centre, shape (H, W) each."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    dx, dy = (x - pose.x) / pose.radius, (y - pose.y) / pose.radius
    c, s, root = math.cos(pose.angle), math.sin(pose.angle), math.sqrt(pose.stretch)
    return (c * dx + s * dy) * root, (c * dy - s * dx) / root


def _blob(rng: Rng) -> Outline:
    """Outline of a distractor: a circle with random waves."""
    depth, phase = rng.uniform(-0.2, 0.2, size=5).tolist(), rng.uniform(0, 2 * math.pi, size=5).tolist()

    def outline(u: Field, v: Field) -> Field:
        theta = np.arctan2(v, u)
        waves = sum(d * np.cos(k * theta + p) for k, d, p in zip(range(1, 6), depth, phase, strict=True))
        return np.hypot(u, v) - 0.75 - waves

    return outline


def _style(label: int, rng: Rng) -> tuple[Texture, float]:
    """Texture and hue; a distractor has any hue and is flat, or borrows a texture without its outline."""
    if label >= 0:
        return SHAPES[label].texture, SHAPES[label].hue + rng.normal(0, 14)
    borrowed = SHAPES[int(rng.integers(len(SHAPES)))].texture
    return (borrowed if rng.random() < 0.3 else flat), rng.uniform(0, 360)


def _paint(label: int, u: Field, v: Field, rng: Rng) -> Field:
    """Blend two tones of a hue by a texture and shade the result along both axes; (H, W, 3)."""
    texture, hue = _style(label, rng)
    main = _bgr(hue, rng.uniform(0.55, 1), rng.uniform(0.6, 1))
    if rng.random() < 0.5:
        other = _bgr(hue + rng.normal(0, 20), rng.uniform(0.3, 1), rng.uniform(0.05, 0.3))
    else:
        other = _bgr(hue + rng.normal(0, 20), rng.uniform(0, 0.2), rng.uniform(0.8, 1))
    blend = texture(u, v, int(rng.integers(2**31)))[..., None].astype(np.float32)
    slope = rng.uniform(-0.2, 0.2, size=2).astype(np.float32)
    shade = 1 + slope[0] * np.clip(u, -1, 1) + slope[1] * np.clip(v, -1, 1)
    return (other + blend * (main - other)) * shade[..., None].astype(np.float32)


def _bgr(hue: float, saturation: float, value: float) -> Field:
    """Colour in 0..1 from a hue in degrees."""
    rgb = colorsys.hsv_to_rgb((hue / 360) % 1, saturation, value)
    return np.array(rgb[::-1], dtype=np.float32)


def _background(height: int, width: int, rng: Rng) -> Field:
    """Smooth noise in three octaves between dull colours, crossed by thin lines; (H, W, 3)."""
    canvas = np.full((height, width, 3), rng.uniform(0.2, 0.7, 3), dtype=np.float32)
    for cells, strength in ((3, 0.25), (10, 0.12), (40, 0.08)):
        noise = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        noise = 0.6 * noise + 0.4 * noise.mean(axis=2, keepdims=True)
        canvas += strength * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(int(rng.integers(4, 16))):
        ends = rng.integers(-20, LONG_SIDE + 20, size=4).tolist()
        colour = _bgr(rng.uniform(0, 360), rng.uniform(0, 0.6), rng.uniform(0.1, 0.9)).tolist()
        cv2.line(canvas, ends[:2], ends[2:], colour, int(rng.integers(1, 4)))
    return canvas


def _develop(canvas: Field, rng: Rng) -> Image:
    """Brightness, slight blur and sensor noise; then 8 bits."""
    canvas = canvas * np.float32(rng.uniform(0.8, 1.15))
    canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.3, 0.8))
    canvas = canvas + rng.normal(0, rng.uniform(0.01, 0.04), canvas.shape).astype(np.float32)
    return (np.clip(canvas, 0, 1) * 255).round().astype(np.uint8)
