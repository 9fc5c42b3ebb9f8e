"""Finding the quantizers' parameters: capture blocks, weigh errors by importance, search range factors."""

from apq_mmdet.calibration.calibrator import BlockReport, calibrate
from apq_mmdet.calibration.importance import CalibrationTask, FeatureTask
from apq_mmdet.calibration.recipe import Recipe, SearchConfig

__all__ = ["BlockReport", "CalibrationTask", "FeatureTask", "Recipe", "SearchConfig", "calibrate"]
