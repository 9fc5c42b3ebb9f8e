"""Finding the quantizers' parameters: capture blocks, weigh errors by importance, search range factors."""

from apq_mmdet.calibration.calibrator import calibrate
from apq_mmdet.calibration.importance import CalibrationTask, FeatureTask
from apq_mmdet.calibration.recipe import Recipe, SearchConfig
from apq_mmdet.calibration.reports import BlockReport

__all__ = ["BlockReport", "CalibrationTask", "FeatureTask", "Recipe", "SearchConfig", "calibrate"]
