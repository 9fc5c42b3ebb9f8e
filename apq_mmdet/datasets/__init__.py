"""Data: the procedurally drawn demo set, and the images of a config or a folder to calibrate on."""

from apq_mmdet.datasets.demo import annotation, demo_image, write_demo_set
from apq_mmdet.datasets.scene import Instance, draw_scene
from apq_mmdet.datasets.shapes import CLASSES

__all__ = ["CLASSES", "Instance", "annotation", "demo_image", "draw_scene", "write_demo_set"]
