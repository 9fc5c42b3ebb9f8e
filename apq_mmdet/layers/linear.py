"""Quantized fully connected layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.layers.base import QuantizedLayer, register_layer


@register_layer(nn.Linear)
class QuantizedLinear(QuantizedLayer, nn.Linear):
    """``y = Q(x) Q(W)^T + b``; x: [..., in], W: [out, in]."""

    kind = "Linear"
    roles = ("weight", "input")

    def role_axis(self, role: str) -> tuple[int, int]:
        """See the base class."""
        return (0, self.out_features) if role == "weight" else (-1, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Linear layer on quantized operands; the bias stays float."""
        return F.linear(self.quantize("input", x), self.quantize("weight", self.weight), self.bias)
