"""Uniform affine quantization, asymmetric or symmetric, per tensor, channel, head or group."""

from typing import Any

import torch
from torch import Tensor

from apq_mmdet.quantizers.base import Quantizer
from apq_mmdet.quantizers.fused import Fused
from apq_mmdet.quantizers.straight_through import straight_through
from apq_mmdet.registry import QUANTIZERS

Bound = Tensor | float  # of codes less the zero point: a number on a CPU where all groups have one zero point


def _clip(x: Tensor, low: Bound, high: Bound) -> Tensor:
    """In place; torch's clamp is one pass with numbers and three times as slow as two passes with tensors on a CPU."""
    if isinstance(low, float):
        return x.clamp_(low, high)
    return x.clamp_min_(low).clamp_max_(high)


def fake_quantize_affine(x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
    """``clip(round(x / scale), low, high) scale``; its gradient is that of x inside the range and zero outside."""
    shifted = torch.div(x.detach(), scale).round_()
    return straight_through(x, shifted, lambda codes: _clip(codes, low, high), lambda codes: codes.mul_(scale))


@Fused
def shifted_codes(x: Tensor, scale: Tensor, low: Bound, high: Bound) -> Tensor:
    """``clip(round(x / scale), low, high)``: codes less the zero point, whose bounds are ``low`` and ``high``."""
    return _clip(torch.div(x, scale).round_(), low, high)


@QUANTIZERS.register_module(name="affine")
class AffineQuantizer(Quantizer):
    """Uniform quantizer with float scale s and integer zero point z.

    encode: q = clamp(round(x / s) + z, code_min, code_max); decode: x = (q - z) s.
    Asymmetric: s = f (max - min) / (2^k - 1), z = clamp(round(-f min / s)); symmetric: s = f max|x| / (2^(k-1) - 1),
    z = 0. The range always holds zero, so that zero padding is exact.
    """

    linear = True
    _made: tuple | None = None  # what _broadcast made last, and from what

    def parameters_for(
        self, low: Tensor, high: Tensor, factor: float, variant: float | None = None
    ) -> tuple[Tensor, ...]:
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
        return fake_quantize_affine(x, *self._broadcast(x))

    def shifted_codes(self, x: Tensor) -> Tensor:
        """See the base class."""
        return shifted_codes(x, *self._broadcast(x))

    def _broadcast(self, x: Tensor) -> tuple[Tensor, Bound, Bound]:
        """Scale and the bounds of q - z against ``x``, made anew when a parameter was replaced or modified.

        Bounding q - z spares adding z to x and taking it off again.
        """
        if self.scale.is_inference():  # such tensors do not say when they are modified
            self._made = None
            return self._bounds(x)
        shape = (x.dim(), x.shape[self.axis]) if self.groups > 1 else None
        key = (shape, self.scale._version, self.zero_point._version)
        made = self._made
        if made is None or made[0] is not self.scale or made[1] is not self.zero_point or made[2] != key:
            made = self._made = (self.scale, self.zero_point, key, self._bounds(x))
        return made[3]

    def _bounds(self, x: Tensor) -> tuple[Tensor, Bound, Bound]:
        scale = self.per_element(self.scale, x)
        if self.zero_point.device.type == "cpu":  # elsewhere reading a number makes the host wait
            points = set(self.zero_point.tolist())
            if len(points) == 1:
                low = float(self.code_min - points.pop())
                return scale, low, low + (self.code_max - self.code_min)
        low = self.per_element((self.code_min - self.zero_point).to(self.scale.dtype), x)
        return scale, low, low + (self.code_max - self.code_min)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without what was made for the original."""
        return {**super().__getstate__(), "_made": None}
