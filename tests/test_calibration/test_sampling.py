"""Smaller calls that a block is judged on: their windows, rows, float outputs and seeds."""

from dataclasses import replace

import pytest
import torch
from helpers import recipe
from test_search import prepared
from torch import nn

from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.sampling import sample_call, sample_rows, sampled_units
from apq_mmdet.calibration.units import rows_of, unit_module
from apq_mmdet.layers import float_only, quantizers_of
from apq_mmdet.quantizers import QuantizerMode


def test_window_sampling_is_a_valid_crop():
    settings = recipe("apq_fast", search=dict(windows=1))
    block, calls = prepared(1, settings)
    with torch.no_grad(), float_only(block):
        small = sample_call(block, calls[1], settings.search, seed=5)
        again = sample_call(block, calls[1], settings.search, seed=5)
        assert torch.equal(block(*small.args), small.outputs[0])
    assert small.args[1] == (7, 7)
    assert torch.equal(small.args[0], again.args[0])
    height, width = calls[1].args[1]
    grid = calls[1].args[0].view(height, width, -1)
    crops = [grid[:7, c : c + 7].reshape(1, 49, -1) for c in (0, 7)]
    assert any(torch.equal(crop, small.args[0]) for crop in crops)
    with torch.no_grad(), float_only(block):  # the same crop of the gradients
        told = sample_call(block, replace(calls[1], grads=[calls[1].args[0]]), settings.search, seed=5)
    assert torch.equal(told.grads[0], told.args[0])


def test_rows_are_sampled_with_what_belongs_to_them():
    settings = recipe("apq_fast", search=dict(rows=4)).search
    rows = torch.arange(9.0)[:, None]
    call = BlockCall((rows,), {"mask": rows + 1}, [rows + 2], [rows + 3], 0, ((rows + 4,), {}))
    small = sample_rows(nn.Identity(), call, settings, torch.Generator().manual_seed(0))
    kept = small.args[0]
    assert len(kept.unique()) == 4
    assert torch.equal(kept, kept.sort(0).values)
    others = [small.kwargs["mask"], small.outputs[0], small.grads[0], small.float_inputs[0][0]]
    assert all(torch.equal(other, kept + i) for i, other in enumerate(others, 1))
    assert sample_rows(nn.Identity(), call, replace(settings, rows=9), torch.Generator()) is call


@pytest.mark.parametrize("mode", [QuantizerMode.FLOAT, QuantizerMode.QUANTIZE])
@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
@torch.no_grad()
def test_a_sample_has_float_outputs_whatever_the_block_is_set_to(index, mode):
    settings = recipe("apq_fast", w_bits=2, a_bits=2, search=dict(windows=1))
    block, calls = prepared(index, settings)
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
        quantizer.mode = mode
    units = sampled_units(block, calls[1], settings.search, seed=5)
    with float_only(block):
        floats = rows_of([unit_module(block)(*units.args)], len(units.targets))
    assert len(units.targets) == 1
    assert torch.allclose(units.targets, floats, atol=1e-5)


@torch.no_grad()
def test_each_image_has_windows_of_its_own():
    settings = recipe("apq_fast", search=dict(windows=1))
    block, (_, call, _) = prepared(0, settings)
    call = replace(call, args=(torch.randn(1, 70 * 70, 8), (70, 70)))
    call = replace(call, outputs=[call.args[0]], grads=[call.args[0]])
    with float_only(block):
        found = [sample_call(block, replace(call, image=i), settings.search, seed=5).args[0] for i in (0, 1, 2, 0)]
    assert torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[1], found[2])
