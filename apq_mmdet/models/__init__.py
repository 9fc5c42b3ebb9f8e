"""Registered quantized variants of mmdet's detectors and backbones."""

from apq_mmdet.models import mmdet_compensation, mmdet_layers, mmdet_transforms, mmdet_views
from apq_mmdet.models.detectors import QuantizedDetector
from apq_mmdet.models.distillation import detection_task
from apq_mmdet.models.swin import QuantizedSwinTransformer

__all__ = [
    "QuantizedDetector",
    "QuantizedSwinTransformer",
    "detection_task",
    "mmdet_compensation",
    "mmdet_layers",
    "mmdet_transforms",
    "mmdet_views",
]
