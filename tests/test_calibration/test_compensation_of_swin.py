"""Compensation of a whole Swin block, on data that it has not seen."""

import pytest
import torch
from helpers import as_calls, build_swin, observed, recipe, short_grids

from apq_mmdet.calibration.blocks import BlockCall, partition
from apq_mmdet.calibration.compensation import (
    CompensationConfig,
    compensate,
)
from apq_mmdet.calibration.search import search_block
from apq_mmdet.calibration.units import to_units, unit_module
from apq_mmdet.layers import float_only, quantize_model
from apq_mmdet.layers.base import quantized_layers


@torch.no_grad()
def block_errors(index, config, seed=0):
    """Mean squared output errors of a searched Swin block on the calibration images and on new ones."""
    torch.manual_seed(seed)
    swin = build_swin()
    settings = recipe("apq_plus", w_bits=3, a_bits=3, search=dict(grids={**short_grids(), "MatMul": (0.9, 1.1, 5)}))
    quantize_model(swin, settings.policy)
    block = list(partition(swin).values())[1 + index]
    mix = torch.randn(8, 8)
    inputs = [(torch.randn(1, h * w, 8) @ mix, (h, w)) for h, w in [(13, 9), (10, 16), (21, 18), (14, 14)]]
    calibration = inputs[:2]
    entries = []
    for image, (args, output) in enumerate(zip(calibration, observed(block, calibration), strict=True)):
        entries.append(to_units(block, BlockCall(args, {}, [output], [torch.randn_like(output)], image)))
    view, calls = unit_module(block), as_calls(entries)
    with float_only(block):
        targets = [block(*args) for args in inputs]
    search_block(view, calls, settings.search)
    if config is not None:
        before = {name: layer.weight.clone() for name, layer in quantized_layers(view) if hasattr(layer, "weight")}
        compensate(view, calls, config)
        assert list(before) == ["attn.w_msa.qkv", "attn.w_msa.proj", "ffn.layers.0.0", "ffn.layers.1"]
        assert not any(torch.equal(view.get_submodule(name).weight, before[name]) for name in before)
    errors = [float((block(*args) - t).square().mean()) for args, t in zip(inputs, targets, strict=True)]
    return sum(errors[:2]), sum(errors[2:])


@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
def test_a_swin_block_gets_better_on_new_data_too(index):
    searched, compensated = (block_errors(index, config) for config in (None, CompensationConfig()))
    assert compensated[0] < 0.8 * searched[0]
    assert compensated[1] < 0.9 * searched[1]
    for part in (CompensationConfig(rounding=False), CompensationConfig(activations=False)):
        assert block_errors(index, part)[0] < searched[0]
