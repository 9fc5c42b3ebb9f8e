"""Quantized layers and blocks compute what they did wherever they do not quantize."""

import copy

import pytest
import torch
from helpers import build_swin, recipe
from mmdet.models.backbones.swin import SwinBlock
from torch import nn

from apq_mmdet.layers import float_only, quantize_model, quantizers_of
from apq_mmdet.layers.convert import leave_float
from apq_mmdet.policy import Policy
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode


@pytest.mark.parametrize("output_size", [None, [14, 12]])
def test_transposed_convolutions_with_groups_and_gaps(output_size):
    layer = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2, dilation=2)  # [6, 5] -> [13, 11] to [14, 12]
    model, x = nn.Sequential(copy.deepcopy(layer)), torch.randn(1, 4, 6, 5)
    quantize_model(model, Policy())
    with float_only(model):
        assert torch.equal(model[0](x, output_size), layer(x, output_size))


def test_layers_that_are_left_float_divide_their_input_no_more():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4))
    quantize_model(model, Policy.from_dict(dict(overrides=dict(divided=dict(input=dict(granularity="channel"))))))
    assert all(f"{i}.input_factors" in model.state_dict() for i in range(2))
    leave_float(model, ["0"])
    assert [key for key in model.state_dict() if key.startswith("0.")] == ["0.weight", "0.bias"]


@pytest.mark.parametrize("mode", [QuantizerMode.FLOAT, QuantizerMode.OBSERVE])
def test_blocks_that_do_not_quantize_are_not_compensated(mode):
    swin, x = build_swin(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        want = swin(x)[0]
        quantize_model(swin, recipe("qwt").policy)
        blocks = [block for block in swin.modules() if isinstance(block, SwinBlock)]
        for block in blocks:
            block.output_compensation.bias.fill_(1.0)
        with quantizer_mode(quantizers_of(swin), mode):
            assert torch.equal(swin(x)[0], want)
