"""Registered quantized variants of mmdet's detectors and backbones, and backbones of timm.

timm is not imported from here: a ``TimmBackbone`` does it when it is built.
"""

from apq_mmdet.models import mmdet_layers, mmdet_transforms, mmdet_views
from apq_mmdet.models.detectors import QuantizedDetector
from apq_mmdet.models.distillation import detection_task
from apq_mmdet.models.simple_feature_pyramid import SimpleFeaturePyramid
from apq_mmdet.models.swin import QuantizedSwinTransformer
from apq_mmdet.models.timm_backbones import TimmBackbone

__all__ = [
    "QuantizedDetector",
    "QuantizedSwinTransformer",
    "SimpleFeaturePyramid",
    "TimmBackbone",
    "detection_task",
    "mmdet_layers",
    "mmdet_transforms",
    "mmdet_views",
]
