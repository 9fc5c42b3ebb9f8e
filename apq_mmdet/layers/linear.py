"""Quantized fully connected layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.layers.base import QuantizedLayer, register_layer
from apq_mmdet.layers.integer import linear_of_codes, rescale


@register_layer(nn.Linear)
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``y = Q(x) Q(W)^T + b``; x: [..., in], W: [out, in]."""

    kind = "Linear"
    roles = ("weight", "input")

    def role_axis(self, role: str) -> tuple[int, int]:
        """See the base class."""
        return (0, self.out_features) if role == "weight" else (-1, self.in_features)

    @property
    def depth(self) -> int:
        """See the base class."""
        return self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Linear layer on quantized operands; the bias stays float."""
        x, weight = self.quantize("input", x), self.quantize("weight", self.weight)
        if not self.takes_codes:
            return F.linear(x, weight, self.bias)
        return rescale(linear_of_codes(x, weight, self.codes_are_int8), self.code_scale(), self.bias)
