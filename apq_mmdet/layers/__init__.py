"""Quantized layers: a float layer plus one quantizer per tensor role."""

from apq_mmdet.layers import attention
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers, quantizers_of, register_layer
from apq_mmdet.layers.conv import QuantizedConv2d, QuantizedConvTranspose2d
from apq_mmdet.layers.convert import LayerRow, quantize_model
from apq_mmdet.layers.linear import QuantizedLinear
from apq_mmdet.layers.matmul import AttentionValueProduct, QueryKeyProduct
from apq_mmdet.layers.state import packed_state_dict

__all__ = [
    "AttentionValueProduct",
    "LayerRow",
    "QuantizedConv2d",
    "QuantizedConvTranspose2d",
    "QuantizedLayer",
    "QuantizedLinear",
    "QueryKeyProduct",
    "attention",
    "float_only",
    "packed_state_dict",
    "quantize_model",
    "quantized_layers",
    "quantizers_of",
    "register_layer",
]
