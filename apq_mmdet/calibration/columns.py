"""Layers that multiply their weight [N, K] with columns of their input, and these columns."""

import torch.nn.functional as F
from torch import Tensor

from apq_mmdet.layers.base import QuantizedLayer

MOST_INPUTS = (
    2**13
)  # K up to which [K, K] matrices are made: of 0.5 GiB in float64, about six of which are held at once
TOKENS = 2**12  # that are multiplied at once


def has_columns(layer: QuantizedLayer) -> bool:
    """Whether a layer is a linear or a plain convolution of at most MOST_INPUTS inputs."""
    plain = layer.kind == "Linear" or (
        layer.kind == "Conv2d"
        and layer.groups == 1
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
    return plain and layer.depth <= MOST_INPUTS


def columns_of(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """What each output position multiplies with the weight, [positions, K]."""
    if layer.kind == "Linear":
        return x.reshape(-1, x.shape[-1])
    x = x if x.dim() == 4 else x.unsqueeze(0)  # [B, C, H, W]
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [B, K, L]
    return patches.transpose(1, 2).flatten(0, 1)


def positions_of(layer: QuantizedLayer, output: Tensor) -> Tensor:
    """[positions, N], in the order of ``columns_of``."""
    if layer.kind == "Linear":
        return output.reshape(-1, output.shape[-1])
    output = output if output.dim() == 4 else output.unsqueeze(0)  # [B, N, H, W]
    return output.flatten(2).transpose(1, 2).flatten(0, 1)
