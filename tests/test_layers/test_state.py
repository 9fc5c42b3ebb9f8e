import copy

import pytest
import torch
from helpers import build_swin, recipe, short_grids
from mmengine.runner.checkpoint import load_state_dict as mmengine_load
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.errors import CheckpointError, UncalibratedError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model, quantized_layers
from apq_mmdet.layers.state import VERSION_KEY

LAYER = "stages.0.blocks.0.ffn.layers.1"


def fresh(**settings):
    model = build_swin()
    quantize_model(model, recipe("minmax", **settings).policy)
    return model


@pytest.fixture
def calibrated():
    model = fresh()
    calibrate(model, [torch.randn(1, 3, 37, 50)], recipe("minmax"))
    return model


def mmengine_loader(model, state):
    mmengine_load(model, type(model.state_dict())(state), strict=False)


LOADERS = {"torch": lambda model, state: model.load_state_dict(state), "mmengine": mmengine_loader}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
def test_loaded_model_is_bit_identical(load, bits):
    model = fresh(w_bits=bits)
    calibrate(model, [torch.randn(1, 3, 37, 50)], recipe("minmax", w_bits=bits))
    state = packed_state_dict(model)
    torch.manual_seed(1)
    other = fresh(w_bits=bits)
    load(other, state)
    x = torch.randn(1, 3, 41, 30)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), other(x), strict=True))
    again = packed_state_dict(other)
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], state[key]) for key in state)


def test_weights_are_packed(calibrated):
    state = packed_state_dict(calibrated)
    for name, layer in quantized_layers(calibrated):
        if "weight" in layer.quantizers:
            assert f"{name}.weight" not in state
            assert state[f"{name}.weight_codes"].dtype == torch.uint8
            assert state[f"{name}.weight_codes"].numel() == (layer.weight.numel() + 1) // 2


def test_a_live_state_dict_with_float_weights_loads_too(calibrated):
    state = copy.deepcopy(calibrated.state_dict())
    other = fresh()
    other.load_state_dict(state)
    x = torch.randn(1, 3, 41, 30)
    with torch.no_grad():
        assert torch.equal(calibrated(x)[0], other(x)[0])


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize(
    "missing",
    [
        f"{LAYER}.quantizers.input.scale",
        f"{LAYER}.weight_codes",
        f"{LAYER}.quantizers.weight.calibrated",
        "norm0.bias",
        VERSION_KEY,
    ],
)
def test_half_a_checkpoint_is_refused(calibrated, load, missing):
    state = packed_state_dict(calibrated)
    del state[missing]
    with pytest.raises(CheckpointError, match=LAYER if "stages" in missing else missing):
        load(fresh(), state)


def change(key, value):
    return lambda state: state.update({key: value})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change(VERSION_KEY, torch.tensor(99)), "format version 99.*newer apq_mmdet"),
        (change(VERSION_KEY, torch.tensor(1)), "format version 1.*quantize the detector again"),
        (change(f"{LAYER}.weight_codes", torch.zeros(3, dtype=torch.uint8)), "3 bytes of packed codes"),
        (change(f"{LAYER}.quantizers.weight.scale", torch.ones(5)), "scale is \\(5,\\), the model has \\(1,\\)"),
        (change(f"{LAYER}.quantizers.input.calibrated", torch.tensor(False)), "not calibrated.*role input"),
        (change(f"{LAYER}.quantizers.input.bits", torch.tensor(8, dtype=torch.uint8)), "8 in the checkpoint, 4 in"),
        (change("stages.9.weight", torch.ones(1)), "unexpected stages.9.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(calibrated, edit, message):
    state = packed_state_dict(calibrated)
    edit(state)
    with pytest.raises(CheckpointError, match=message):
        fresh().load_state_dict(state)


def test_a_symmetric_config_refuses_an_asymmetric_checkpoint(calibrated):
    rule = dict(kind="Linear", weight=dict(symmetric=True))
    with pytest.raises(
        CheckpointError, match=r"weight\.format is 'affine, asymmetric' in the checkpoint, 'affine, symm.*' in"
    ):
        fresh(overrides=dict(mine=rule)).load_state_dict(packed_state_dict(calibrated))


@pytest.mark.parametrize("other", ["affine", "row_affine", "log_sqrt2", "twin_softmax"])
def test_attention_codes_of_another_format_are_refused(calibrated, other):
    """Most formats hold tensors of the same names and shapes, which mean other values in each."""
    rule = dict(kind="MatMul", attention=dict(format=other))
    with pytest.raises(CheckpointError, match=rf"attention\.format is 'matthew, .*' in .* '{other}, asymmetric' in"):
        fresh(overrides=dict(mine=rule)).load_state_dict(packed_state_dict(calibrated))


def test_symmetric_weights_round_trip():
    settings = dict(overrides=dict(mine=dict(kind="Linear", weight=dict(symmetric=True))))
    model = fresh(**settings)
    calibrate(model, [torch.randn(1, 3, 37, 50)], recipe("minmax", **settings))
    other = fresh(**settings)
    other.load_state_dict(packed_state_dict(model))
    x = torch.randn(1, 3, 41, 30)
    with torch.no_grad():
        assert torch.equal(model(x)[0], other(x)[0])


def test_other_bits_are_refused(calibrated):
    with pytest.raises(CheckpointError, match="holds 4-bit weights, the config asks for 6"):
        fresh(w_bits=6).load_state_dict(packed_state_dict(calibrated))


def test_saving_an_uncalibrated_model_is_refused():
    with pytest.raises(CheckpointError, match="not calibrated"):
        packed_state_dict(fresh())


class Counting(nn.Module):
    """A module with a state that is no tensor."""

    def __init__(self, number):
        super().__init__()
        self.layer, self.number = nn.Linear(4, 4), number

    def get_extra_state(self):
        return {"number": self.number, "names": ["a", "b"]}

    def set_extra_state(self, state):
        self.number = state["number"]

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize("nested", [False, True])
def test_an_extra_state_that_is_no_tensor_goes_into_a_checkpoint_and_comes_back(nested):
    models = []
    for number in (3, 5):
        model = nn.Sequential(Counting(number)) if nested else Counting(number)
        quantize_model(model, recipe("minmax").policy)
        models.append(model)
    model, other = models
    x = torch.randn(3, 4)
    calibrate(model, [x], recipe("minmax"))
    state = packed_state_dict(model)
    assert state["0._extra_state" if nested else "_extra_state"] == {"number": 3, "names": ["a", "b"]}
    other.load_state_dict(state)
    assert (other[0] if nested else other).number == 3
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_float_weights_take_a_calibrated_model_back_to_its_beginning():
    settings = recipe("apq_plus", search=dict(grids=short_grids(2)), compensation=dict(ranges=2))  # changes weights
    model, x = build_swin(), torch.randn(1, 3, 37, 50)
    floats, want = copy.deepcopy(model.state_dict()), model(x)[0]
    quantize_model(model, settings.policy)
    calibrate(model, [x], settings)
    model.load_state_dict(floats)
    with pytest.raises(UncalibratedError):
        model(x)
    with pytest.raises(CheckpointError, match="not calibrated"):
        packed_state_dict(model)
    with float_only(model):
        assert torch.allclose(model(x)[0], want, atol=1e-5)
    calibrate(model, [x], settings)  # is not refused for changed weights
