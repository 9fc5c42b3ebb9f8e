"""Uniform affine quantization, asymmetric or symmetric, per tensor, channel, head or group."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from apq_mmdet.quantizers.base import Quantizer
from apq_mmdet.registry import QUANTIZERS


def round_clamp(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``clamp(round(x / scale), low, high) * scale``: the affine fake quantization with shifted code bounds.

    ``low`` and ``high`` are the code bounds less the zero point. Codes are small integers, so leaving out the
    ``+ z`` and ``- z`` of the textbook formula changes no bit and saves two passes over memory.
    """
    return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)


class _StraightThrough(torch.autograd.Function):
    """``round_clamp`` whose gradient is 1 inside the range and 0 outside (straight-through estimator)."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
        codes = torch.div(x, scale).round_()
        ctx.save_for_backward((codes >= low) & (codes <= high))
        return codes.clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None, None


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
        scale = self.per_element(self.scale, x)
        zero_point = self.per_element(self.zero_point, x).to(x.dtype)
        low, high = self.code_min - zero_point, self.code_max - zero_point
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightThrough.apply(x, scale, low, high)
        return round_clamp(x, scale, low, high)
