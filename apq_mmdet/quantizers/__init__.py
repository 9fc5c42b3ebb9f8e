"""Number formats: a quantizer maps float tensors to integer codes and back, and knows nothing of layers or data."""

from apq_mmdet.quantizers.affine import AffineQuantizer
from apq_mmdet.quantizers.base import Quantizer, QuantizerMode, quantizer_mode
from apq_mmdet.quantizers.dynamic import DynamicAffineQuantizer
from apq_mmdet.quantizers.log import AdaptiveLogQuantizer, LogSqrt2Quantizer, ShiftLog2Quantizer
from apq_mmdet.quantizers.matthew import MatthewQuantizer
from apq_mmdet.quantizers.observers import OBSERVERS, MinMaxObserver, Observer, PercentileObserver
from apq_mmdet.quantizers.packing import pack_codes, unpack_codes
from apq_mmdet.quantizers.row import RowAffineQuantizer
from apq_mmdet.quantizers.token import TokenAffineQuantizer
from apq_mmdet.quantizers.twin import TwinGeluQuantizer, TwinSoftmaxQuantizer

__all__ = [
    "OBSERVERS",
    "AdaptiveLogQuantizer",
    "AffineQuantizer",
    "DynamicAffineQuantizer",
    "LogSqrt2Quantizer",
    "MatthewQuantizer",
    "MinMaxObserver",
    "Observer",
    "PercentileObserver",
    "Quantizer",
    "QuantizerMode",
    "RowAffineQuantizer",
    "ShiftLog2Quantizer",
    "TokenAffineQuantizer",
    "TwinGeluQuantizer",
    "TwinSoftmaxQuantizer",
    "pack_codes",
    "quantizer_mode",
    "unpack_codes",
]
