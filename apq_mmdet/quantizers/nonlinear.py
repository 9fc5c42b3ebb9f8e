"""What formats share whose values are no multiples of a scale; they differ in three formulas."""

from abc import abstractmethod

import torch
from torch import Tensor

from apq_mmdet.quantizers.base import Quantizer
from apq_mmdet.quantizers.straight_through import straight_through


class NonlinearQuantizer(Quantizer):
    """Unsigned codes with zero point 0; a format is a scale, the code of a value and the value of a code."""

    signed = False
    lowest = 0.0
    source = "softmax outputs"
    roles = ("attention",)

    @abstractmethod
    def scale_for(self, high: Tensor, factor: float, variant: float | None) -> Tensor:
        """The scale for a range up to ``factor * high``, float64 [G]."""

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """Codes of ``x`` as whole floats, in a new tensor and not clamped: those out of range are of clipped values."""

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """Values of codes that are given as whole floats."""

    def parameters_for(
        self, low: Tensor, high: Tensor, factor: float, variant: float | None = None
    ) -> tuple[Tensor, ...]:
        """See the base class."""
        variant = self.default_variant if variant is None else variant
        scale = self.scale_for(high.double().clamp(min=0.0), factor, variant)
        degenerate = scale < torch.finfo(torch.float32).tiny  # an all-zero group: any scale keeps the zeros
        scale = torch.where(degenerate, torch.ones_like(scale), scale).float()
        parameters = (scale, torch.zeros_like(scale, dtype=torch.int32))
        return (*parameters, torch.full_like(scale, variant)) if self.variants else parameters

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        return self.positions(x).clamp_(self.code_min, self.code_max).to(torch.int32)

    def decode(self, codes: Tensor) -> Tensor:
        """See the base class."""
        return self.values(codes.to(self.scale.dtype))

    def fake_quantize(self, x: Tensor) -> Tensor:
        """See the base class."""
        codes = self.positions(x.detach())
        return straight_through(x, codes, lambda q: q.clamp_(self.code_min, self.code_max), self.values)
