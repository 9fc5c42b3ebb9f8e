"""Uniform affine quantization, asymmetric or symmetric, per tensor, channel, head or group."""

from typing import Any

import torch
from torch import Tensor

from apq_mmdet.quantizers.base import Quantizer
from apq_mmdet.registry import QUANTIZERS


class _StraightThrough(torch.autograd.Function):
    """Affine fake quantization whose gradient is 1 inside the range and 0 outside (straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, code_min: int, code_max: int) -> Tensor:
        codes = torch.div(x, scale).round_().add_(zero_point)
        ctx.save_for_backward((codes >= code_min) & (codes <= code_max))
        return codes.clamp_(code_min, code_max).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None, None


@QUANTIZERS.register_module(name="affine")
class AffineQuantizer(Quantizer):
    """Uniform quantizer with float scale s and integer zero point z.

    encode: q = clamp(round(x / s) + z, code_min, code_max); decode: x = (q - z) s.
    Asymmetric: s = f (max - min) / (2^k - 1), z = clamp(round(-f min / s)); symmetric: s = f max|x| / (2^(k-1) - 1),
    z = 0. The range always holds zero, so that zero padding is exact.
    """

    def parameters_for(self, low: Tensor, high: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """See the base class; the arithmetic is in float64, the returned scale in float32."""
        low = low.double().clamp(max=0.0)
        high = high.double().clamp(min=0.0)
        if self.symmetric:
            scale = factor * torch.maximum(-low, high) / self.code_max
            zero_point = torch.zeros_like(scale)
        else:
            scale = factor * (high - low) / (self.code_max - self.code_min)
            zero_point = (-factor * low / scale).round().clamp(self.code_min, self.code_max)
        degenerate = scale < torch.finfo(torch.float32).tiny  # an all-zero group: any scale keeps the zeros
        scale = torch.where(degenerate, torch.ones_like(scale), scale)
        zero_point = torch.where(degenerate, torch.zeros_like(zero_point), zero_point)
        return scale.float(), zero_point.to(torch.int32)

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        scale, zero_point = self.per_element(self.scale, x), self.per_element(self.zero_point, x)
        codes = torch.div(x, scale).round_().add_(zero_point)
        return codes.clamp_(self.code_min, self.code_max).to(torch.int32)

    def decode(self, codes: Tensor) -> Tensor:
        """See the base class."""
        shifted = codes - self.per_element(self.zero_point, codes)
        return shifted.to(self.scale.dtype) * self.per_element(self.scale, codes)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the base class."""
        scale, zero_point = self.per_element(self.scale, x), self.per_element(self.zero_point, x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, scale, zero_point, self.code_min, self.code_max)
        codes = torch.div(x, scale).round_().add_(zero_point)
        return codes.clamp_(self.code_min, self.code_max).sub_(zero_point).mul_(scale)
