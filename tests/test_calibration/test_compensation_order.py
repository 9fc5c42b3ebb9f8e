"""Compensation of one layer after the other: as they run, with all of their runs."""

import copy

import torch
from test_compensation import EXACT, TINY, Chain, correlated, least_squares, prepared
from torch import nn

from apq_mmdet.calibration.compensation import CompensationConfig, compensate
from apq_mmdet.layers import float_only


class Backwards(Chain):
    """The same layers, named the other way round."""

    def __init__(self):
        super().__init__()
        self._modules["first"] = self._modules.pop("first")


def test_layers_are_compensated_in_the_order_they_run_in():
    states = []
    for make in (Chain, Backwards):
        torch.manual_seed(0)
        block, calls = prepared(make(), correlated())
        compensate(block, calls, CompensationConfig())
        states.append(block.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class Twice(nn.Module):
    """A layer that runs on what it gave."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.layer(x).tanh())


@torch.no_grad()
def test_a_layer_that_runs_twice_makes_up_for_the_errors_of_both_runs():
    (x,) = correlated(images=1)
    block, calls = prepared(Twice(), [x], EXACT)
    before = copy.deepcopy(block).layer
    compensate(block, calls, CompensationConfig(rounding=False, ranges=0, damping=TINY, weighted=False))
    quantize = before.quantizers["input"].fake_quantize
    quantized = torch.cat([quantize(x), quantize(before(x).tanh())]).double()
    with float_only(before):
        floats = torch.cat([x, before(x).tanh()]).double()
    alike = torch.ones(len(floats), dtype=torch.float64)
    want = least_squares(before.weight.double(), floats, quantized, alike, True, TINY)
    assert torch.equal(block.layer.weight, before.quantizers["weight"].fake_quantize(want.float()))


def test_layers_of_double_precision_are_compensated_as_others_are():
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 4)).to(dtype)
        block, calls = prepared(block, [x.to(dtype) for x in correlated()])
        bias = block[0].bias.detach().clone()
        compensate(block, calls, CompensationConfig(weighted=False))
        found.append((block[0].weight.float(), (block[0].bias - bias).float()))
    (weight, moved), (double_weight, double_moved) = found
    assert torch.allclose(weight, double_weight, atol=1e-5)
    assert torch.allclose(moved, double_moved, atol=1e-4)
    assert float(moved.abs().min()) > 1e-3
