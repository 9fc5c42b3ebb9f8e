"""Matthew-effect Preserving Quantization (MPQ) of softmax outputs, APQ-ViT, ACM MM 2022 (arXiv 2303.14341).

A reconstruction: the paper's equations could not be read verbatim. "Matthew effect" is its name for the power law of
attention maps: few large values hold most of the mass, and clipping them costs most.
"""

import torch
from torch import Tensor

from apq_mmdet.quantizers.affine import AffineQuantizer
from apq_mmdet.registry import QUANTIZERS


@QUANTIZERS.register_module(name="matthew")
class MatthewQuantizer(AffineQuantizer):
    """Affine quantizer of non-negative attention maps that keeps the head of the power law.

    All 2^k codes lie on [0, f max A] with zero point 0, and the range factor f never falls below 0.9: at most the
    top tenth of the range can be clipped, whatever an error metric would prefer.
    """

    signed = False
    lowest = 0.0
    source = "softmax outputs"
    roles = ("attention",)
    min_factor = 0.9

    def parameters_for(
        self, low: Tensor, high: Tensor, factor: float, variant: float | None = None
    ) -> tuple[Tensor, ...]:
        """See the base class."""
        return super().parameters_for(torch.zeros_like(low), high, max(factor, self.min_factor))
