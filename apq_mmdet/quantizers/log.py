"""Logarithmic formats of softmax outputs: fine steps at zero, where a power law has most of its values.

Zero is one of the 2^k codes in each of them. The official codes of RepQ-ViT and AdaLog give the last code a value and
zero beyond it, which is 2^k + 1 values.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from apq_mmdet.quantizers.nonlinear import NonlinearQuantizer
from apq_mmdet.registry import QUANTIZERS


class _LogQuantizer(NonlinearQuantizer):
    """q = clamp(round(-log2(A / s) / t), 0, 2^k - 1); A' = s 2^(-q t), and 0 for the last code; s = f max A."""

    @abstractmethod
    def octaves(self, x: Tensor) -> Tensor | float:
        """How many halvings t a step of the code is, against ``x``."""

    def scale_for(self, high: Tensor, factor: float, variant: float | None) -> Tensor:
        """See the base class."""
        return factor * high

    def positions(self, x: Tensor) -> Tensor:
        """See the base class."""
        ratio = torch.div(x, self.per_element(self.scale, x)).clamp_(min=0.0)
        return ratio.log2_().neg_().div_(self.octaves(x)).round_()

    def values(self, codes: Tensor) -> Tensor:
        """See the base class."""
        halvings = codes * self.octaves(codes)
        values = halvings.neg_().exp2_().mul_(self.per_element(self.scale, codes))
        return values.masked_fill_(codes == self.code_max, 0.0)


@QUANTIZERS.register_module(name="log_sqrt2")
class LogSqrt2Quantizer(_LogQuantizer):
    """Logarithm to base sqrt 2 (RepQ-ViT, Li et al., ICCV 2023, eq. 18-21).

    q = clamp(round(-2 log2(A / s)), 0, 2^k - 1); A' = s 2^(-ceil(q / 2)) (1 + (sqrt 2 - 1) [q odd]) = s 2^(-q / 2).
    """

    def octaves(self, x: Tensor) -> float:
        """See the base class."""
        return 0.5


@QUANTIZERS.register_module(name="adaptive_log")
class AdaptiveLogQuantizer(_LogQuantizer):
    """Logarithm to a searched base 2^(Q / r), r = 37 (AdaLog, Wu et al., ECCV 2024).

    q = clamp(round(-log2(A / s) r / Q), 0, 2^k - 1); A' = s 2^(-q Q / r). The variant is Q. The official search tries
    each whole Q from 10 upwards; ``variants`` covers 10 to 60 in steps of about a sixth. The official evaluation also
    rounds the fraction of the power of two to k + 1 bits, for a table in hardware.
    """

    resolution = 37  # r
    variants = (10.0, 12.0, 14.0, 17.0, 20.0, 24.0, 28.0, 32.0, 37.0, 43.0, 50.0, 60.0)
    default_variant = 37.0

    def octaves(self, x: Tensor) -> Tensor:
        """See the base class."""
        return self.per_element(self.variant, x) / self.resolution


@QUANTIZERS.register_module(name="shift_log2")
class ShiftLog2Quantizer(NonlinearQuantizer):
    """Uniform steps of a shifted logarithm (shift-uniform-log2 of I&S-ViT, Zhong et al., 2023, arXiv 2311.10126).

    u = log2(A + eta) is quantized uniformly from log2(eta) to log2(f max A + eta) and A' = 2^u' - eta. The variant is
    eta. Written as u - log2(eta) = log2(1 + A / eta) = q s, so that zero is exact. The official code also rounds u'
    to whole numbers, which leaves fewer different values than codes.
    """

    variants = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
    default_variant = 0.01

    def scale_for(self, high: Tensor, factor: float, variant: float | None) -> Tensor:
        """See the base class."""
        return (factor * high / variant).log1p() / math.log(2) / self.code_max

    def positions(self, x: Tensor) -> Tensor:
        """See the base class."""
        ratio = torch.div(x, self.per_element(self.variant, x)).clamp_(min=-1.0)
        return ratio.log1p_().div_(self._step(x)).round_()

    def values(self, codes: Tensor) -> Tensor:
        """See the base class."""
        return (codes * self._step(codes)).expm1_().mul_(self.per_element(self.variant, codes))

    def _step(self, x: Tensor) -> Tensor:
        """The scale in units of the natural logarithm, against ``x``."""
        return self.per_element(self.scale, x) * math.log(2)
