"""Blocks and models that work on their tensors in place are calibrated as those that work on copies."""

import pytest
import torch
from helpers import recipe, short_grids
from test_compensation import correlated, prepared
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.compensation import CompensationConfig, compensate
from apq_mmdet.errors import CalibrationError
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


class Normalises(nn.Module):
    """A model that changes the sample it was given."""

    def __init__(self, in_place):
        super().__init__()
        self.first, self.second, self.in_place = nn.Linear(4, 4), nn.Linear(4, 4), in_place

    def forward(self, x):
        x = x.sub_(1).div_(2) if self.in_place else (x - 1) / 2
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("name", ["apq", "apq_plus"])
def test_a_model_may_change_its_sample(name):
    """All of its runs are given the same one."""
    check_alike(Normalises, name, search=dict(grids=short_grids(6)))


class ChangesItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        y = self.layer(x)
        x += y
        return x


@pytest.mark.parametrize("inference", [False, True])
def test_a_block_that_changes_its_input_is_refused(inference, monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [ChangesItsInput])
    model = nn.Sequential(nn.Tanh(), ChangesItsInput())
    settings = recipe("apq", search=dict(grids=short_grids(6), objective=dict(type="mse")))
    quantize_model(model, settings.policy)
    with torch.inference_mode(inference), pytest.raises(CalibrationError, match="'1' changes its input in place"):
        calibrate(model, [torch.randn(60, 4)], settings)


def test_a_block_keeps_a_forward_of_its_own():
    """Which is no method of its class."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = own = lambda x, layer=model[0]: type(layer).forward(layer, x) + 10
    settings = recipe("apq_plus", search=dict(grids=short_grids(6)))
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(60, 4)], settings)
    assert model[0].forward is own
    assert "forward" not in vars(model[1])
