"""Layers that divide their inputs by factors of the channels, which the weights take up."""

import pytest
import torch
from helpers import as_calls, build_swin, observed, recipe, short_grids
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.transforms import InputRescaling, channel_extents, equalize, rescalings_of
from apq_mmdet.calibration.units import to_units, unit_module
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model, quantized_layers
from apq_mmdet.policy import Policy

LAYERS = {
    "linear": (lambda: nn.Linear(6, 4), (5, 6)),
    "conv": (lambda: nn.Conv2d(6, 4, 3, padding=1), (2, 6, 5, 5)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (2, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6), (2, 6, 5, 5)),
}
UNEVEN = torch.tensor([0.01, 0.1, 1.0, 10.0, 3.0, 0.3])


def divided(make, **settings):
    model = nn.Sequential(make())
    rule = dict(input=dict(granularity="channel", **settings), weight=dict(granularity="channel"))
    quantize_model(model, Policy.from_dict(dict(w_bits=8, a_bits=4, overrides=dict(all=rule))))
    return model


@pytest.mark.parametrize("kind", LAYERS)
def test_float_function_is_kept(kind):
    make, shape = LAYERS[kind]
    model, x = divided(make).double(), torch.randn(shape).double()
    with float_only(model):
        want = model(x)
        InputRescaling("input", model[0]).divide(UNEVEN)
        assert not torch.equal(model[0].input_factors, torch.ones(6))
        assert torch.allclose(model(x), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", LAYERS)
def test_values_by_the_plain_formula_in_float64(kind):
    make, shape = LAYERS[kind]
    model = divided(make).double()
    layer, x = model[0], torch.randn(shape).double()
    InputRescaling("input", layer).divide(UNEVEN)
    columns = UNEVEN.double().view(1, -1, *[1] * (x.dim() - 2))
    for role, tensor in (("input", x / columns), ("weight", layer.weight)):
        layer.quantizers[role].observe(tensor)
        layer.quantizers[role].set_range_factor(1.0)
    weight, quantized = (
        q.decode(q.encode(t)) for q, t in zip(layer.quantizers.values(), (layer.weight, x / columns), strict=True)
    )
    if kind == "linear":
        want = nn.functional.linear(quantized, weight, layer.bias)
    else:
        want = nn.functional.conv2d(quantized, weight, layer.bias, padding=1, groups=layer.groups)
    assert torch.allclose(model(x), want, rtol=1e-12, atol=1e-12)


def test_spans_are_of_what_is_left():
    (layer,) = divided(LAYERS["linear"][0])
    place = InputRescaling("input", layer)
    low, high = -UNEVEN.double(), 2 * UNEVEN.double()
    assert torch.allclose(place.imbalance(low, high), 3 * UNEVEN.double())
    place.divide(UNEVEN)
    assert torch.allclose(place.imbalance(low, high), torch.full((6,), 3.0).double(), rtol=1e-6)


def plus(**settings):
    search = dict(metric="module", rounds=1, order="forward", block_input="quantized", grids=short_grids())
    return recipe("apq_plus", search=search, **settings)


def test_calibration_makes_channels_behind_the_gelu_even_and_the_checkpoint_keeps_it():
    model = build_swin()
    quantize_model(model, plus().policy)
    dividing = {name: layer for name, layer in quantized_layers(model) if layer.input_factors is not None}
    assert set(dividing) == {f"stages.0.blocks.{i}.ffn.layers.1" for i in range(2)}
    images = [torch.randn(1, 3, 37, 50) for _ in range(2)]
    seen = {}
    for name, layer in dividing.items():
        layer.quantizers["input"].register_forward_pre_hook(lambda _, x, n=name: seen.setdefault(n, []).append(x[0]))
    calibrate(model, images, plus(compensation=None))  # which would move them a little
    for name, layer in dividing.items():
        assert layer.input_factors.max() / layer.input_factors.min() > 1.3
        seen[name].clear()
    with torch.no_grad(), float_only(model):
        for image in images:
            model(image)
    for rows in seen.values():
        x = torch.cat([r.flatten(0, -2) for r in rows])
        spans = x.amax(0).clamp(min=0) - x.amin(0).clamp(max=0)
        assert torch.allclose(spans, spans.mean().expand_as(spans), rtol=1e-4)  # seen in float, hardly moved since

    state = packed_state_dict(model)
    torch.manual_seed(1)
    other = build_swin()
    quantize_model(other, plus().policy)
    other.load_state_dict(state)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(images[0]), other(images[0]), strict=True))


def test_a_layer_behind_a_norm_is_made_even_once():
    model = build_swin(depth=1)
    quantize_model(model, plus(overrides=dict(all=dict(kind="Linear", input=dict(granularity="channel")))).policy)
    block = model.stages[0].blocks[0]
    inputs = [operand for place in rescalings_of(block) for operand in place.operands if operand[1] == "input"]
    assert [inputs.count(operand) for operand in dict.fromkeys(inputs)] == [1, 2, 1, 1]  # values, then their projection
    dividing = [place.name for place in rescalings_of(block) if isinstance(place, InputRescaling)]
    assert dividing == ["attn.w_msa.proj.input", "ffn.layers.1.input"]


@torch.no_grad()
def test_layers_divide_what_the_other_rescalings_leave():
    """Values are made even for their own sake, and then what the projection behind them is given."""
    model = build_swin(depth=1)
    quantize_model(model, plus(overrides=dict(all=dict(kind="Linear", input=dict(granularity="channel")))).policy)
    block = model.stages[0].blocks[0]
    dividing = [place for place in rescalings_of(block) if isinstance(place, InputRescaling)]
    for place in rescalings_of(block):
        if not isinstance(place, InputRescaling):
            place.divide(torch.randn(8).exp())
    args = (torch.randn(1, 98, 8), (14, 7))
    (output,) = observed(block, [args])
    view, calls = unit_module(block), as_calls([to_units(block, BlockCall(args, {}, [output], None, 0))])
    equalize(block, view, calls, 1.0)
    with float_only(block):
        extents = channel_extents(dividing, lambda: view(*calls[0].args))
    assert len(dividing) == 2
    for place, extent in zip(dividing, extents, strict=True):
        span = place.imbalance(*extent)
        assert float(span.max() / span.min()) == pytest.approx(1, abs=1e-3), place.name


def test_factors_that_nothing_finds_are_refused():
    mine = dict(kind="Linear", input=dict(granularity="channel"))
    with pytest.raises(BadInputError, match=r"quant\.overrides\.mine\.input: .* needs quant\.equalize"):
        plus(equalize=0.0, overrides=dict(mine=mine))


def test_float_weights_need_no_factors_of_before():
    model = build_swin()
    float_state = {key: value.clone() for key, value in model.state_dict().items()}
    x = torch.randn(1, 3, 37, 50)
    with torch.no_grad():
        want = model(x)
    quantize_model(model, plus().policy)
    calibrate(model, [x], plus())
    model.load_state_dict(float_state)
    with torch.no_grad(), float_only(model):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(model(x), want, strict=True))


def test_a_convolution_of_a_single_image():
    model = divided(LAYERS["conv"][0])
    InputRescaling("input", model[0]).divide(UNEVEN)
    x = torch.randn(6, 5, 7)
    with float_only(model):
        assert torch.allclose(model(x), model(x[None])[0], atol=1e-6)


def test_transposed_convolutions_have_no_such_factors():
    with pytest.raises(BadInputError, match="granularity 'channel' does not fit role 'input'"):
        divided(lambda: nn.ConvTranspose2d(6, 4, 2))
