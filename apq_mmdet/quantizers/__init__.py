"""Number formats: a quantizer maps float tensors to integer codes and back, and knows nothing of layers or data."""

from apq_mmdet.quantizers.affine import AffineQuantizer
from apq_mmdet.quantizers.base import Quantizer, QuantizerMode, quantizer_mode
from apq_mmdet.quantizers.matthew import MatthewQuantizer
from apq_mmdet.quantizers.packing import pack_codes, unpack_codes

__all__ = [
    "AffineQuantizer",
    "MatthewQuantizer",
    "Quantizer",
    "QuantizerMode",
    "pack_codes",
    "quantizer_mode",
    "unpack_codes",
]
