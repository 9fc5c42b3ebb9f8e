"""Blocks and models that work on their tensors in place are calibrated as those that work on copies."""

import pytest
import torch
from helpers import recipe, short_grids
from test_compensation import correlated, prepared
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.compensation import CompensationConfig, compensate
from apq_mmdet.layers import packed_state_dict, quantize_model


def state_of(model, name, **settings):
    """Factors of all blocks, and weights and quantizers, after a calibration."""
    settings = recipe(name, scope="detector", **settings)
    quantize_model(model, settings.policy)
    report = calibrate(model, [torch.randn(60, 4) for _ in range(2)], settings)
    return [block.factors for block in report.blocks], packed_state_dict(model)


def check_alike(make, name, **settings):
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        found.append(state_of(make(in_place), name, **settings))
    (factors, state), (other_factors, other_state) = found
    assert factors == other_factors
    assert all(torch.equal(state[key], other_state[key]) for key in state)


class Residual(nn.Module):
    """A block that changes what its first layer was given."""

    def __init__(self, in_place):
        super().__init__()
        self.first, self.second, self.in_place = nn.Linear(4, 4), nn.Linear(4, 4), in_place

    def forward(self, x):
        y = x.tanh()
        z = self.first(y)
        return self.second(y.add_(z) if self.in_place else y + z)


@pytest.mark.parametrize(
    ("name", "settings"), [("apq_plus", {}), ("apq_plus", dict(compensation=dict(weighted=True))), ("ptq4vit", {})]
)
def test_what_a_layer_was_given_may_change_behind_it(name, settings, monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Residual])
    check_alike(Residual, name, search=dict(grids=short_grids(6)), **settings)


class Again(nn.Module):
    """A model that changes what it gave a block before it calls the block again."""

    def __init__(self, in_place):
        super().__init__()
        self.stem, self.block, self.in_place = nn.Linear(4, 4), nn.Linear(4, 4), in_place

    def forward(self, x):
        x = self.stem(x)
        for _ in range(2):
            y = self.block(x)
            x = x.add_(y) if self.in_place else x + y
        return x


@pytest.mark.parametrize("block_input", ["float", "quantized"])
def test_what_a_block_was_given_may_change_before_its_next_call(block_input):
    check_alike(Again, "apq_plus", search=dict(grids=short_grids(6), block_input=block_input))


@pytest.mark.parametrize("weighted", [False, True])
def test_what_a_layer_gave_may_change_behind_it(weighted):
    weights = []
    for in_place in (False, True):
        torch.manual_seed(0)
        block = nn.Sequential(nn.Linear(6, 6), nn.ReLU(in_place), nn.Linear(6, 4))
        block, calls = prepared(block, correlated())
        compensate(block, calls, CompensationConfig(weighted=weighted))
        weights.append(torch.cat([block[0].weight.flatten(), block[2].weight.flatten()]))
    assert torch.equal(*weights)
