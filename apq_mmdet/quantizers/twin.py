"""Twin uniform quantization (PTQ4ViT, Yuan et al., ECCV 2022): the top bit of a code says which of two ranges it is of.

Each range has its own step and 2^(k-1) codes.
"""

import torch
from torch import Tensor

from apq_mmdet.quantizers.nonlinear import NonlinearQuantizer
from apq_mmdet.registry import QUANTIZERS

GELU_MINIMUM = 0.16997124254703522  # -min of x Phi(x)


class _TwinQuantizer(NonlinearQuantizer):
    @property
    def half(self) -> int:
        """Number of codes of each range, 2^(k-1)."""
        return (self.code_max + 1) // 2


@QUANTIZERS.register_module(name="twin_softmax")
class TwinSoftmaxQuantizer(_TwinQuantizer):
    """Small steps below s, large ones on [0, 1] from there; for softmax outputs.

    A < s: q = round(A / d), d = s / (2^(k-1) - 1); else q = 2^(k-1) + round(A / D), D = 1 / (2^(k-1) - 1). The variant
    is i in s = 2^-i, with the candidates of the official code, which starts from s = 0.01. ``scale`` is D, whatever the
    range is. This is the paper's form: the official forward adds both halves, which is s too much from s on.
    """

    ranged = False
    variants = tuple(float(i) for i in range(20))
    default_variant = 7.0

    def scale_for(self, high: Tensor, factor: float, variant: float | None) -> Tensor:
        """See the base class."""
        return torch.full_like(high, 1 / (self.half - 1))

    def positions(self, x: Tensor) -> Tensor:
        """See the base class."""
        large, split = self.per_element(self.scale, x), self._split(x)
        low = torch.div(x, large * split).round_()
        high = torch.div(x, large).round_().add_(self.half)
        return torch.where(x < split, low, high)

    def values(self, codes: Tensor) -> Tensor:
        """See the base class."""
        large = self.per_element(self.scale, codes)
        is_low = codes < self.half
        return torch.where(is_low, codes * (large * self._split(codes)), (codes - self.half) * large)

    def _split(self, x: Tensor) -> Tensor:
        """s against ``x``."""
        return torch.exp2(-self.per_element(self.variant, x))


@QUANTIZERS.register_module(name="twin_gelu")
class TwinGeluQuantizer(_TwinQuantizer):
    """A searched step for positive values, a fixed one for negative ones; for GELU outputs.

    q = 2^(k-1) + n; n = round(x / s) >= 0 with s = f max x / (2^(k-1) - 1), or n = round(x / d) < 0 with
    d = 0.16997 / 2^(k-1), the lowest value of GELU being -0.16997.
    """

    lowest = -0.175  # leaves room for approximations of GELU
    source = "GELU outputs"
    roles = ("input",)

    def scale_for(self, high: Tensor, factor: float, variant: float | None) -> Tensor:
        """See the base class."""
        return factor * high / (self.half - 1)

    def positions(self, x: Tensor) -> Tensor:
        """See the base class."""
        return torch.div(x, self._steps(x)).round_().add_(self.half)

    def values(self, codes: Tensor) -> Tensor:
        """See the base class."""
        shifted = codes - self.half
        return shifted * self._steps(shifted)

    def _steps(self, x: Tensor) -> Tensor:
        """The step of each element by its sign."""
        return torch.where(x < 0, GELU_MINIMUM / self.half, self.per_element(self.scale, x))
