"""The run of a quantization: loop, checkpoints, the command's logic."""

from apq_mmdet.engine.checkpoint import load_float_weights, save_quantized
from apq_mmdet.engine.detector import quantize_detector, save_detector
from apq_mmdet.engine.ptq_loop import PTQLoop

__all__ = ["PTQLoop", "load_float_weights", "quantize_detector", "save_detector", "save_quantized"]
