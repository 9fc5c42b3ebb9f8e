"""Data that the toolbox draws or reads by itself: the procedurally drawn demo set."""

from .demo import annotation, demo_image, write_demo_set
from .scene import Instance, draw_scene
from .shapes import CLASSES

__all__ = ["CLASSES", "Instance", "annotation", "demo_image", "draw_scene", "write_demo_set"]
