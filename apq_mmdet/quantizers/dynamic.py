"""Dynamic formats: scale and offset follow from the data at run time; calibration finds the range factor alone."""

from typing import ClassVar

import torch
from torch import Tensor

from apq_mmdet.quantizers.affine import fake_quantize_affine
from apq_mmdet.quantizers.base import Quantizer
from apq_mmdet.registry import QUANTIZERS


class DynamicQuantizer(Quantizer):
    """Unsigned codes; the values that share a scale (a token, a RoI, a map) span its range from least to greatest.

    Raises:
        ValueError: groups were asked for of a format that makes none.

    Attributes:
        grouped: whether groups of channels or heads may have shares of their own.
        scale: step as a share of what the values of a grid span, f / (2^k - 1).
    """

    signed = False
    dynamic = True
    grouped: ClassVar[bool] = False

    def __init__(self, bits: int, axis: int = 0, groups: int = 1, symmetric: bool = False) -> None:
        if groups != 1 and not self.grouped:
            raise ValueError(f"the {self.format_name()} format has one grid for all channels: no groups of them")
        super().__init__(bits, axis, groups, symmetric)

    def parameters_for(
        self, low: Tensor, high: Tensor, factor: float, variant: float | None = None
    ) -> tuple[Tensor, ...]:
        """See the base class; the range is a share of what the data bring along, not of what was observed."""
        scale = torch.full_like(high, factor / self.code_max, dtype=torch.float32)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def range_error(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """See the base class; zero, because no observed range changes anything."""
        return torch.zeros(len(x), dtype=torch.float64, device=x.device)

    def decode(self, codes: Tensor) -> Tensor:
        """See ``decode_on``; codes alone do not tell their grids."""
        raise TypeError(f"values of {self.format_name()} codes need the grids of their data: use decode_on")


@QUANTIZERS.register_module(name="dynamic_affine")
class DynamicAffineQuantizer(DynamicQuantizer):
    """Affine codes of a layer's input x, on a grid for each row of a matrix product or each image of a convolution.

    With l and h the least and the largest of zero and all values that share a grid: s = f (h - l) / (2^k - 1),
    z = round(-f l / s), q = clamp(round(x / s) + z, 0, 2^k - 1), x' = (q - z) s.

    Those are a linear layer's tokens or RoIs [..., channels] and a convolution's images or RoIs [B, channels, H, W]:
    from ``axis``, that of the channels, on. So s leaves the product and z is an integer, as in ONNX'
    DynamicQuantizeLinear, and zero, of which ReLUs and padding are full, has a code. In a batch of images the values
    that fill up the smaller ones count as theirs.
    """

    inputs_of = ("Linear", "Conv2d", "ConvTranspose2d")

    def __init__(self, bits: int, axis: int = -1, groups: int = 1, symmetric: bool = False) -> None:
        super().__init__(bits, axis=axis, groups=groups, symmetric=symmetric)

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Step s and zero point z for the values of ``x``, in its dtype, with size 1 from ``axis`` on."""
        rows = x.detach().flatten(self.axis)  # on a CPU aminmax takes five times as long
        low, high = rows.amin(-1).clamp_(max=0), rows.amax(-1).clamp_(min=0)
        least = torch.finfo(x.dtype).tiny  # values that are all zero
        step = ((high - low) * self.scale.to(x.dtype)).clamp_min_(least)
        zero_point = (low / (high - low).clamp_min_(least)).mul_(-self.code_max).round_()  # no overflow in float16
        shape = (*step.shape, *[1] * (x.dim() - step.dim()))
        return step.view(shape), zero_point.view(shape)

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        step, zero_point = self.grid(x)
        codes = torch.div(x, step).round_().add_(zero_point)
        return codes.clamp_(self.code_min, self.code_max).to(torch.int32)

    def decode_on(self, codes: Tensor, step: Tensor, zero_point: Tensor) -> Tensor:
        """Values of codes on given grids, in their dtype."""
        return (codes.to(step.dtype) - zero_point) * step

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``decode_on(encode(x), *grid(x))``, equal to the last bit; straight-through gradient inside the range."""
        step, zero_point = self.grid(x)
        return fake_quantize_affine(x, step, self.code_min - zero_point, self.code_max - zero_point)
