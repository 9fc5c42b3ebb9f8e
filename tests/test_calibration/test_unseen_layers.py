"""Layers that no calibration data reaches, or not that of every image."""

import pytest
import torch
from helpers import recipe, short_grids
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers import quantize_model


class Branching(nn.Module):
    """The second layer only sees wide inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        return self.second(y) if len(x) > 3 else y


def test_a_quantizer_without_data_is_an_error_with_its_name():
    settings = recipe("minmax")
    model = Branching()
    quantize_model(model, settings.policy)
    with pytest.raises(CalibrationError, match=r"second \(input\).*on_unseen='float'"):
        calibrate(model, [torch.randn(2, 4)], settings)


@pytest.mark.parametrize("name", ["minmax", "apq"])
def test_or_is_left_float_if_asked(name):
    settings = recipe(name, on_unseen="float")
    model = Branching()
    quantize_model(model, settings.policy)
    report = calibrate(model, [torch.randn(2, 4)], settings)
    assert report.left_float == ["second"]
    assert {row.reason for row in model.quantization_table if row.layer == "second"} == {
        "no calibration data reached it"
    }
    x = torch.randn(5, 4)
    with torch.no_grad():
        assert torch.equal(model(x), nn.functional.linear(model.first(x), model.second.weight, model.second.bias))


@pytest.mark.parametrize("name", ["apq", "apq_fast"])
def test_a_layer_that_some_calls_skip_is_searched(name, monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Branching])
    settings = recipe(name, search=dict(grids=short_grids(4)))
    model = Branching()
    quantize_model(model, settings.policy)
    report = calibrate(model, [torch.randn(n, 4) for n in (2, 6, 2)], settings)
    assert set(report.blocks[0].factors) == {"first.weight", "first.input", "second.weight", "second.input"}


class Dead(nn.Module):
    """A block whose layer never runs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x * 2


def test_a_block_whose_layers_were_left_float_is_passed_over(monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Dead])
    settings = recipe("apq", search=dict(grids=short_grids(4)), on_unseen="float")
    model = nn.Sequential(nn.Linear(4, 4), Dead(), nn.Linear(4, 4))
    quantize_model(model, settings.policy)
    report = calibrate(model, [torch.randn(3, 4)], settings)
    assert report.left_float == ["1.layer"]
    assert [block.block for block in report.blocks] == ["0", "2"]


class Sometimes(nn.Module):
    """A block that is always called, here with nothing."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


class Empty(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), Sometimes()

    def forward(self, x):
        y = self.body(x)
        return y, self.head(y[:0])


def test_a_block_that_saw_empty_inputs_alone_is_passed_over_too(monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Sometimes])
    settings = recipe("apq", search=dict(grids=short_grids(4)), on_unseen="float")
    model = Empty()
    quantize_model(model, settings.policy)
    report = calibrate(model, [torch.randn(3, 4)], settings)
    assert report.left_float == ["head.layer"]
    assert [block.block for block in report.blocks] == ["body"]


class Methods(nn.Module):
    """A block with a second method that runs its layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)

    def other(self, x):
        return self.layer(x)


class ByMethod(nn.Module):
    """A model that runs its second block without calling it."""

    def __init__(self):
        super().__init__()
        self.p, self.q = Methods(), Methods()

    def forward(self, x):
        return self.q.other(self.p(x).relu())


@pytest.mark.parametrize("name", ["apq", "apq_plus", "repq"])
def test_a_block_whose_layers_run_without_it_is_refused(name, monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Methods])
    short = dict(grids=short_grids(2))
    settings, model = recipe(name, search=short), ByMethod()
    quantize_model(model, settings.policy)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(CalibrationError, match=r"block 'q'"):
        calibrate(model, [torch.randn(9, 4)], settings)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    settings, model = recipe(name, search=short, overrides=dict(q=dict(pattern="q.*", float=True))), ByMethod()
    quantize_model(model, settings.policy)
    assert [block.block for block in calibrate(model, [torch.randn(9, 4)], settings).blocks] == ["p"]
    settings, model = recipe("minmax"), ByMethod()  # looks at no blocks
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(9, 4)], settings)


class Beside(nn.Module):
    """A block one of whose layers runs beside it."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.inner(x)


class UsesTheLayerOfABlock(nn.Module):
    """Runs a block, and one of the block's layers by itself."""

    def __init__(self):
        super().__init__()
        self.neck = Beside()

    def forward(self, x):
        return self.neck(x), self.neck.outer(x)


def test_a_layer_that_runs_beside_its_block_is_not_made_even(monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Beside])
    settings = recipe("apq_plus", w_bits=4, a_bits=4, scope="detector")
    model = UsesTheLayerOfABlock()
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(20, 4) * torch.tensor([1.0, 2.0, 4.0, 8.0])], settings)
    assert model.neck.outer.input_factors.tolist() == [1.0] * 4
    assert model.neck.inner.input_factors.unique().numel() > 1
