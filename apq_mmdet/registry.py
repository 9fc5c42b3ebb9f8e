"""Registries of this package: children of mmengine's, so that ``type='apq_mmdet.X'`` works in any config.

mmengine imports this module when it meets the scope ``apq_mmdet`` and then the ``locations`` below.
"""

from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

SCOPE = "apq_mmdet"

MODELS = Registry("model", parent=MMENGINE_MODELS, scope=SCOPE, locations=["apq_mmdet.models"])
LOOPS = Registry("loop", parent=MMENGINE_LOOPS, scope=SCOPE, locations=["apq_mmdet.engine"])
QUANTIZERS = Registry("quantizer", scope=SCOPE, locations=["apq_mmdet.quantizers"])
OBJECTIVES = Registry("objective", scope=SCOPE, locations=["apq_mmdet.calibration.objectives"])
