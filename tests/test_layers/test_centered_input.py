"""Layers that take the means of their inputs' channels off, before each token is quantized on its own grid."""

import pytest
import torch
from helpers import as_calls, build_swin, recipe, short_grids
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.centers import center_inputs, centered_layers
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.calibration.transforms import InputRescaling, rescalings_of
from apq_mmdet.calibration.units import UnitCalls, to_units, unit_module
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model
from apq_mmdet.layers.convert import leave_float
from apq_mmdet.policy import Policy
from apq_mmdet.quantizers import QuantizerMode

CENTERS, FACTORS = torch.tensor([5.0, -3.0, 0.0, 1.0, 0.1, 20.0]), torch.tensor([0.01, 0.1, 1.0, 10.0, 3.0, 0.3])


def tokens(model, granularity="channel", bits=3):
    rule = dict(kind="Linear", input=dict(format="token_affine", granularity=granularity))
    quantize_model(model, Policy.from_dict(dict(w_bits=8, a_bits=bits, overrides=dict(all=rule))))
    return model


def calls_of(store, block, inputs):
    """Calls of a block that is a plain linear layer, one image each."""
    calls = UnitCalls(store, ("block", "whole"))
    with float_only(block):
        for image, x in enumerate(inputs):
            store.add_call("block", image, (x,), {}, block(x))
    for call in store.inputs("block"):
        calls.add(to_units(block, call))
    return unit_module(block), calls


def test_values_by_the_plain_formula_in_float64():
    model = tokens(nn.Sequential(nn.Linear(6, 4))).double()
    layer, x = model[0], torch.randn(5, 6).double() + CENTERS
    InputRescaling("input", layer).divide(FACTORS)
    layer.input_centers.copy_(CENTERS / FACTORS)
    for role, tensor in (("input", x), ("weight", layer.weight)):
        layer.quantizers[role].observe(tensor)
        layer.quantizers[role].set_range_factor(1.0)
    weight, centers = layer.quantizers["weight"](layer.weight), (CENTERS / FACTORS).double()
    quantizer = layer.quantizers["input"]
    inside = x / FACTORS.double() - centers
    low, step = quantizer.grid(inside)
    # what integer kernels add up: codes, one term for each token, one constant for each output
    codes = quantizer.encode(inside).double()
    want = step * (codes @ weight.T) + low * weight.sum(1) + centers @ weight.T + layer.bias
    assert torch.allclose(model(x), want, rtol=1e-12, atol=1e-12)
    with float_only(model):
        assert torch.allclose(model(x), nn.functional.linear(x / FACTORS, layer.weight, layer.bias), atol=1e-12)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_centers_are_means_of_all_tokens_and_factors_migrate(granularity):
    layer = tokens(nn.Sequential(nn.Linear(6, 4)), granularity)
    inputs = [torch.randn(1, n, 6) * FACTORS + CENTERS for n in (3, 8)]
    rows = torch.cat([x[0] for x in inputs]).double()
    before = layer[0].weight.detach().double().clone()
    with CaptureStore() as store, torch.no_grad(), float_only(layer):
        want = layer(inputs[0])
        module, calls = calls_of(store, layer, inputs)
        center_inputs(layer, module, calls, 1.0, compensated=True)
        assert torch.allclose(layer(inputs[0]), want, rtol=1e-4, atol=1e-4)
    layer = layer[0]
    if granularity == "tensor":
        assert layer.input_factors is None
        factors = torch.ones(6).double()
    else:
        factors = rows.std(0, unbiased=False) ** 0.75 / before.norm(dim=0) ** 0.25
        factors = factors / factors.log().mean().exp()
        assert torch.allclose(layer.input_factors.double(), factors, rtol=1e-5)
        assert torch.allclose(layer.weight.double(), before * factors, rtol=1e-5)
        assert layer.quantizers["weight"].observed[1].item() == layer.weight.amax().item()
    assert torch.allclose(layer.input_centers.double(), rows.mean(0) / factors, rtol=1e-4, atol=1e-5)


def test_no_strength_leaves_the_factors_alone():
    layer = tokens(nn.Sequential(nn.Linear(6, 4)))
    with CaptureStore() as store, torch.no_grad():
        module, calls = calls_of(store, layer, [torch.randn(1, 3, 6) + CENTERS])
        center_inputs(layer, module, calls, 0.0, compensated=True)
    assert torch.equal(layer[0].input_factors, torch.ones(6))
    assert bool((layer[0].input_centers != 0).all())


@pytest.mark.parametrize("mode", [QuantizerMode.FLOAT, QuantizerMode.OBSERVE])
def test_other_modes_let_the_input_pass_to_the_last_bit(mode):
    layer = tokens(nn.Sequential(nn.Linear(6, 4)))[0]
    layer.input_centers.copy_(1e6 * CENTERS)
    layer.quantizers["input"].mode = mode
    x = torch.randn(2, 6)
    assert torch.equal(layer.quantize("input", x), layer.divided_input(x))


def test_channels_that_do_not_vary_have_no_say():
    """Rounding must not make a deviation out of nothing, whatever the means are."""
    layer = tokens(nn.Sequential(nn.Linear(60, 4)))
    x = torch.randn(1, 1133, 60)
    x[..., :50] = 10 * torch.randn(50)
    with CaptureStore() as store, torch.no_grad():
        module, calls = calls_of(store, layer, [x[:, :33], x[:, 33:133], x[:, 133:]])
        center_inputs(layer, module, calls, 1.0, compensated=True)
    assert torch.equal(layer[0].input_factors[:50], torch.ones(50))
    assert float(layer[0].input_factors[50:].log().sum()) == pytest.approx(0, abs=1e-4)


def test_images_without_tokens_and_layers_that_run_twice():
    model = tokens(nn.Sequential(layer := nn.Linear(6, 6), layer))
    x = torch.randn(1, 9, 6)
    with CaptureStore() as store, torch.no_grad():
        module, calls = calls_of(store, model, [x[:, :0], x])
        with float_only(model):
            seen = torch.cat([x[0], model[0](x)[0]])
        center_inputs(model, module, calls, 0.0, compensated=True)
    assert torch.allclose(model[0].input_centers, seen.mean(0), atol=1e-5)


def test_inputs_that_are_not_finite_are_named():
    model = tokens(nn.Sequential(nn.Linear(6, 4)))
    with CaptureStore() as store, torch.no_grad():
        module, calls = calls_of(store, model, [torch.full((1, 2, 6), torch.nan)])
        with pytest.raises(CalibrationError, match="layer '0': its inputs are NaN"):
            center_inputs(model, module, calls, 1.0, compensated=True)


def test_sums_are_added_in_the_order_of_the_images_whichever_process_has_them(monkeypatch):
    layer = tokens(nn.Sequential(nn.Linear(1, 1)), "tensor")
    sums = {
        image: torch.tensor([[1.0], [total], [4.0]]).double() for image, total in ((0, 1e16), (8, -1e16), (16, 3.0))
    }
    parts = [{(image, "0"): sums[image] for image in images} for images in ((0, 16), (8,))]
    monkeypatch.setattr("apq_mmdet.calibration.centers.gather", lambda own: parts)
    center_inputs(layer, layer, as_calls([]), 1.0, compensated=True)
    assert layer[0].input_centers.tolist() == [1.0]  # of three tokens; 1e16 + 3 - 1e16 is 4 in float64


def test_weights_are_observed_anew_behind_their_factors():
    layer = tokens(nn.Sequential(nn.Linear(6, 4)))
    layer[0].quantizers["weight"].observe(100 * layer[0].weight)
    with CaptureStore() as store, torch.no_grad():
        module, calls = calls_of(store, layer, [torch.randn(1, 9, 6)])
        center_inputs(layer, module, calls, 1.0, compensated=True)
    low, high = layer[0].quantizers["weight"].observed
    assert (low.item(), high.item()) == (layer[0].weight.amin().item(), layer[0].weight.amax().item())


def test_factors_of_centered_inputs_are_no_rescaling():
    """They are found together with the centers."""
    assert rescalings_of(tokens(nn.Sequential(nn.Linear(6, 4)))) == []


@pytest.mark.parametrize(("make", "role"), [(lambda: nn.Conv2d(6, 4, 3), "input"), (lambda: nn.Linear(6, 4), "weight")])
def test_the_format_is_for_inputs_of_linear_layers(make, role):
    rule = {role: dict(format="token_affine")}
    with pytest.raises(BadInputError, match=r"layer '0': format 'token_affine'"):
        quantize_model(nn.Sequential(make()), Policy.from_dict(dict(overrides=dict(all=rule))))


def plus(**settings):
    search = dict(metric="module", rounds=1, order="forward", block_input="quantized", grids=short_grids())
    return recipe("apq_plus", a_bits=3, search=search, **settings)


def test_calibration_finds_centers_and_the_checkpoint_keeps_them():
    model = build_swin()
    float_state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(1, 3, 37, 50)
    quantize_model(model, plus().policy)
    calibrate(model, [x], plus())
    layers = centered_layers(model)
    assert {name.split("blocks.0.")[-1] for name in layers if "blocks.0" in name} == {
        "attn.w_msa.qkv",
        "attn.w_msa.proj",
        "ffn.layers.0.0",
        "ffn.layers.1",
    }
    assert all(float(layer.input_centers.abs().max()) > 0 for layer in layers.values())
    other = build_swin()
    quantize_model(other, plus().policy)
    other.load_state_dict(packed_state_dict(model))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(x), other(x), strict=True))
    model.load_state_dict(float_state)  # which knows nothing of centers
    assert not any(bool(layer.input_centers.any()) for layer in layers.values())


def test_centers_are_those_of_the_equalized_inputs():
    search = dict(metric="module", rounds=1, block_input="quantized", grids=short_grids(2))
    settings = recipe("apq_plus", a_bits=3, search=search, compensation=None, reconstruction=None)
    model, images, seen = build_swin(depth=1), [torch.randn(1, 3, 37, 50) for _ in range(2)], {}
    quantize_model(model, settings.policy)
    calibrate(model, images, settings)
    layers = centered_layers(model)
    for name, layer in layers.items():
        layer.register_forward_pre_hook(
            lambda layer, args, n=name: seen.setdefault(n, []).append(layer.divided_input(args[0]).flatten(0, -2))
        )
    with torch.no_grad(), float_only(model):
        for x in images:
            model(x)
    assert len(seen) == len(layers) > 3
    for name, layer in layers.items():
        x = torch.cat(seen[name])
        assert torch.allclose(layer.input_centers, x.mean(0), atol=1e-3 * float(x.std())), name


def test_a_layer_that_is_left_float_has_none():
    model = tokens(nn.Sequential(nn.Linear(6, 4)))
    leave_float(model, ["0"])
    assert not centered_layers(model)


@pytest.mark.parametrize(("bias", "changes"), [(False, {}), (True, dict(compensation=None))])
@pytest.mark.parametrize("noise", [1e-2, 1e-1])
def test_the_mean_of_a_channel_that_hardly_varies_is_not_lost(noise, bias, changes):
    """Where no bias makes up for what is cut from the weights behind it."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(32, 16, bias=bias), [torch.randn(200, 32) for _ in range(2)]
    for x in inputs:
        x[:, 0] = 3 + noise * x[:, 0]
    with torch.no_grad():
        wanted = [layer(x) for x in inputs]
    model = nn.Sequential(layer)
    settings = recipe("apq_plus", w_bits=3, a_bits=3, reconstruction=None, **changes)
    quantize_model(model, settings.policy)
    calibrate(model, inputs, settings)
    with torch.no_grad():
        errors = [float((model(x) - y).square().mean() / y.var()) for x, y in zip(inputs, wanted, strict=True)]
    assert max(errors) < 0.07
