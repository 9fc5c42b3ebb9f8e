"""Quantized convolutions."""

import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.layers.base import QuantizedLayer, register_layer
from apq_mmdet.layers.integer import integer_precision, rescale


@register_layer(nn.Conv2d)
class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """2-D convolution on quantized operands; x: [B, in, H, W], W: [out, in / groups, kH, kW]."""

    kind = "Conv2d"
    roles = ("weight", "input")

    def role_axis(self, role: str) -> tuple[int, int]:
        """See the base class."""
        return (0, self.out_channels) if role == "weight" else (-3, self.in_channels)

    @property
    def depth(self) -> int:
        """See the base class."""
        return self.weight[0].numel()

    def forward(self, x: Tensor) -> Tensor:
        """Zero padding is exact, because every affine range holds zero."""
        x, weight = self.quantize("input", x), self.quantize("weight", self.weight)
        if not self.takes_codes:
            return self._conv_forward(x, weight, self.bias)
        with integer_precision():
            product = self._conv_forward(x, weight, None)
        bias = None if self.bias is None else self.bias.view(-1, 1, 1)
        return rescale(product, self.code_scale().view(-1, 1, 1), bias)


@register_layer(nn.ConvTranspose2d)
class QuantizedConvTranspose2d(QuantizedLayer, nn.ConvTranspose2d):
    """Transposed convolution on quantized operands; W: [in, out / groups, kH, kW], output channels on axis 1."""

    kind = "ConvTranspose2d"
    roles = ("weight", "input")

    def role_axis(self, role: str) -> tuple[int, int]:
        """See the base class."""
        return (1, self.weight.shape[1]) if role == "weight" else (-3, self.in_channels)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As ``nn.ConvTranspose2d.forward``."""
        output_padding = self._output_padding(
            x, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return F.conv_transpose2d(
            self.quantize("input", x),
            self.quantize("weight", self.weight),
            self.bias,
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
        )
