"""Blocks that branch on what they are given, work in chunks, keep what they computed, or are the whole model."""

import copy

import pytest
import torch
from helpers import as_calls, recipe, short_grids
from test_calibrator import States
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.replay import layer_runs
from apq_mmdet.calibration.units import to_units
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model


class Pair(nn.Module):
    """Two layers, for blocks that use them in different ways."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Deciding(Pair):
    """Its second layer runs where the inputs are positive in the mean."""

    def forward(self, x):
        y = self.a(x)
        return self.b(y.relu()) if x.mean() > 0 else y


class Chunked(Pair):
    """Its first layer runs on eight tokens at a time."""

    def forward(self, x):
        return self.b(torch.cat([self.a(part).relu() for part in x.split(8)]).mean(0, keepdim=True))


class Keeping(Pair):
    """It keeps what is between its layers."""

    def forward(self, x):
        self.last = self.a(x).relu()
        return self.b(self.last)


CASES = {
    "deciding": (Deciding, lambda: [torch.randn(20, 6) - 1, torch.randn(20, 6) + 1], {"a": 1, "b": 1}),
    "chunked": (Chunked, lambda: [torch.randn(8, 6) / 100, torch.randn(24, 6)], {"a": 3, "b": 1}),
}


@pytest.fixture
def whole_model(monkeypatch):
    """A block in a model; returns the calibrated model and its report."""

    def run(cls, images, settings, states=None, root=False):
        monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [cls])
        torch.manual_seed(3)
        model = (cls() if root else nn.Sequential(cls())).eval()
        quantize_model(model, settings.policy)
        return model, calibrate(model, images, settings, states=states)

    return run


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_runs_of_layers_are_those_of_all_calls(case, turned):
    cls, make, want = CASES[case]
    block, images = cls(), make()
    quantize_model(block, recipe("minmax").policy)
    with float_only(block), torch.no_grad():
        calls = [
            to_units(block, BlockCall((x,), {}, [block(x)], None, image))
            for image, x in enumerate(images[::-1] if turned else images)
        ]
        assert layer_runs(block, as_calls(calls)) == want


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_the_order_of_two_images_changes_nothing(case, weighted, whole_model):
    cls, make, _ = CASES[case]
    images = make()
    compensation = dict(activations=True, rounding=True, ranges=0, damping=0.02, weighted=weighted)
    settings = recipe("erq", w_bits=3, a_bits=3, compensation=compensation, search=dict(grids=short_grids(9)))
    (model, report), (turned, report_of_turned) = (
        whole_model(cls, inputs, settings) for inputs in (images, images[::-1])
    )
    assert report.blocks[0].factors == report_of_turned.blocks[0].factors
    a, b = packed_state_dict(model), packed_state_dict(turned)
    assert all(torch.equal(a[key], b[key]) for key in a)
    torch.manual_seed(3)
    before = cls()
    for name in "ab":
        layer = model[0].get_submodule(name)
        nearest = layer.quantizers["weight"](before.get_submodule(name).weight)
        assert not torch.equal(layer.weight, nearest), name  # it makes up for errors


@pytest.mark.parametrize("name", ["erq", "apq_plus"])
def test_blocks_may_keep_what_they_computed(name, whole_model):
    learned = dict(reconstruction=dict(iterations=3, batch=4)) if name == "apq_plus" else {}
    hessian = dict(objective=dict(type="hessian"), grids=short_grids(5))  # takes a pass with gradients
    settings = recipe(name, w_bits=3, a_bits=3, search=hessian, **learned)
    images = [torch.randn(20, 6) for _ in range(2)]
    (keeping, _), (plain, _) = (whole_model(cls, images, settings) for cls in (Keeping, Pair))
    a, b = packed_state_dict(keeping), packed_state_dict(plain)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("name", ["repq", "apq", "erq"])
def test_a_model_that_is_one_block_is_resumed(name, whole_model):
    settings, states = recipe(name, search=dict(grids=short_grids(5), rounds=1)), States()
    images = [torch.randn(20, 6)]
    model, report = whole_model(Pair, images, settings, states, root=True)
    resumed, report_of_resumed = whole_model(Pair, images, settings, copy.deepcopy(states), root=True)
    assert [(block.block, block.resumed) for block in report.blocks] == [("", False)]
    assert [(block.block, block.resumed) for block in report_of_resumed.blocks] == [("", True)]
    a, b = packed_state_dict(model), packed_state_dict(resumed)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_kept_state_of_other_shapes_is_refused(whole_model):
    """Even if it could be repeated to the shapes that are wanted."""
    settings, states = recipe("repq"), States()
    whole_model(Pair, [torch.randn(20, 6)], settings, states)
    state = states["0"]["state"]
    state["a.quantizers.weight.scale"] = state["a.quantizers.weight.scale"][:1]
    with pytest.raises(CalibrationError, match="does not fit the model: start again without --resume"):
        whole_model(Pair, [torch.randn(20, 6)], settings, states)
