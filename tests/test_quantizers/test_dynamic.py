import pytest
import torch
import torch.nn.functional as F
from helpers import build_swin, recipe
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.units import to_units
from apq_mmdet.errors import BadInputError, CheckpointError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model
from apq_mmdet.policy import Policy
from apq_mmdet.quantizers import DynamicAffineQuantizer

AXES = {"tokens": (-1, (2, 5, 7)), "images": (-3, (2, 3, 4, 5)), "axis_from_the_front": (1, (2, 3, 4, 5))}


def calibrated(bits, factor=1.0, axis=-1):
    quantizer = DynamicAffineQuantizer(bits, axis=axis)
    quantizer.observe(torch.randn(3, 4))
    quantizer.set_range_factor(factor)
    return quantizer


def formula(values, bits, factor):
    """x' of values that share a grid, in plain float64."""
    low, high, top = min(0.0, *values), max(0.0, *values), 2**bits - 1
    step = factor * (high - low) / top
    zero_point = round(-factor * low / step)
    return [(min(max(round(v / step) + zero_point, 0), top) - zero_point) * step for v in values]


def test_by_hand():
    quantizer = calibrated(2)
    x = torch.tensor([[-1.0, 0.1, 1.9, 2.0], [0.0, 0.0, 6.0, 2.4], [0.0, 0.0, 0.0, 0.0]])
    assert quantizer.encode(x).tolist() == [[0, 1, 3, 3], [0, 0, 3, 1], [0, 0, 0, 0]]
    assert quantizer(x).tolist() == [[-1, 0, 2, 2], [0, 0, 6, 2], [0, 0, 0, 0]]
    assert calibrated(2, 0.5)(x)[1].tolist() == [0, 0, 3, 2]


@pytest.mark.parametrize("kind", AXES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.1])
def test_values_against_the_plain_formula_in_float64(kind, bits, factor):
    axis, shape = AXES[kind]
    x = torch.randn(shape).double()
    quantizer = calibrated(bits, factor, axis).double()
    quantizer.scale.fill_(factor / (2**bits - 1))  # in float64 as well
    rows = x.flatten(axis).flatten(0, -2)
    want = torch.tensor([formula(row.tolist(), bits, factor) for row in rows], dtype=torch.float64).view(shape)
    assert torch.allclose(quantizer(x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", AXES)
def test_codes_and_values_agree_and_zero_stays_zero(kind):
    axis, shape = AXES[kind]
    x = torch.randn(shape)
    x[..., ::3] = 0
    quantizer = calibrated(3, 0.8, axis)
    codes = quantizer.encode(x)
    assert (codes.min(), codes.max()) == (0, 7)
    assert torch.equal(quantizer.decode_on(codes, *quantizer.grid(x)), quantizer(x))
    assert bool((quantizer(x)[..., ::3] == 0).all())
    with pytest.raises(TypeError, match="decode_on"):
        quantizer.decode(codes)


@pytest.mark.parametrize("kind", AXES)
def test_grids_do_not_see_each_other(kind):
    axis, shape = AXES[kind]
    x, quantizer = torch.randn(shape), calibrated(3, axis=axis)
    assert torch.equal(quantizer(x), torch.cat([quantizer(part[None]) for part in x]))
    assert quantizer(x[:0]).shape == (0, *shape[1:])


def test_products_are_those_of_integer_codes_and_one_factor():
    x, weight = torch.randn(2, 3, 6, 6).double(), torch.randn(4, 3, 3, 3).double()
    quantizer = calibrated(4, 0.9, -3).double()
    step, zero_point = quantizer.grid(x)
    assert torch.equal(zero_point, zero_point.round())
    want = step * F.conv2d(quantizer.encode(x) - zero_point, weight, padding=1)  # padded with zeros
    assert torch.allclose(F.conv2d(quantizer(x), weight, padding=1), want, atol=1e-12, rtol=0)


def test_large_values_in_float16_do_not_overflow():
    x = torch.tensor([[-5000.0, 0.0, 2500.0]]).half()
    assert calibrated(4)(x).tolist()[0] == pytest.approx([-5000, 0, 2500], rel=1e-3)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(5, 3), (2, 4, 5)),
        (nn.Conv2d(5, 3, 3, padding=1), (3, 5, 6, 6)),
        (nn.ConvTranspose2d(5, 3, 2, stride=2), (3, 5, 6, 6)),
    ],
    ids=["linear", "conv", "deconv"],
)
def test_layers_give_tokens_and_images_grids_of_their_own(layer, shape):
    model = nn.Sequential(layer)
    rule = dict(input=dict(format="dynamic_affine"), weight=dict(granularity="tensor"))
    quantize_model(model, Policy.from_dict(dict(w_bits=8, a_bits=4, overrides=dict(mine=rule))))
    layer.quantizers["input"].observe(torch.ones(1))
    layer.quantizers["weight"].observe(layer.weight)
    for quantizer in layer.quantizers.values():
        quantizer.set_range_factor(0.9)
    x = torch.randn(shape).double()
    rows = x.flatten(0, 1) if isinstance(layer, nn.Linear) else x
    want = torch.tensor([formula(row.flatten().tolist(), 4, 0.9) for row in rows], dtype=torch.float64).view(shape)
    assert torch.allclose(layer.quantize("input", x), want, rtol=0, atol=1e-5)  # the share is in float32


def test_a_checkpoint_of_fixed_ranges_is_refused():
    states = {}
    for form in ("affine", "dynamic_affine"):
        rule = dict(input=dict(format=form))
        model = nn.Sequential(nn.Conv2d(3, 4, 3))
        quantize_model(model, Policy.from_dict(dict(w_bits=8, a_bits=4, overrides=dict(mine=rule))))
        calibrate(model, [torch.randn(1, 3, 6, 6)], recipe("minmax"))
        states[form] = packed_state_dict(model)
    model.load_state_dict(states["dynamic_affine"])
    with pytest.raises(CheckpointError, match=r"input\.format is 'affine, .*' in .* 'dynamic_affine, "):
        model.load_state_dict(states["affine"])


def test_gradient_is_straight_through_inside_the_range():
    x = torch.tensor([[0.0, 4.0, 6.0, 10.0]], requires_grad=True)
    calibrated(2, 0.5)(x).sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_a_convolution_that_needs_the_whole_image_is_not_taken_apart():
    image = torch.randn(1, 3, 32, 32)
    for form, separable in (("affine", True), ("dynamic_affine", False)):
        rule = dict(pattern="patch_embed.*", input=dict(format=form))
        quantize_model(model := build_swin(), recipe("apq", overrides=dict(mine=rule)).policy)
        block = model.patch_embed
        with float_only(block), torch.no_grad():
            outputs = [block(image)[0]]
        units = to_units(block, BlockCall((image,), {}, outputs, outputs, image=0))
        assert units.separable is separable


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="symmetric"):
        DynamicAffineQuantizer(4, symmetric=True)
    with pytest.raises(ValueError, match="groups"):
        DynamicAffineQuantizer(4, groups=2)
    rule = dict(kind="MatMul", query=dict(format="dynamic_affine"))
    with pytest.raises(
        BadInputError, match=r"'dynamic_affine' is for inputs of Linear, Conv2d, .*not for role 'query'"
    ):
        quantize_model(build_swin(), recipe("apq", overrides=dict(mine=rule)).policy)
