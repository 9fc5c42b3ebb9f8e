"""apq_mmdet: post-training quantization of transformer detectors in MMDetection."""

from apq_mmdet.torchvision_operators import declare_missing_operators
from apq_mmdet.versions import check_versions

__version__ = "0.1.0"

check_versions()
declare_missing_operators()
