"""Products of integer codes: exact in every precision, equal to the fake-quantized forward up to its rounding."""

import copy

import pytest
import torch
from helpers import recipe
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.layers import integer
from apq_mmdet.layers.base import quantized_layers
from apq_mmdet.layers.convert import quantize_model
from apq_mmdet.layers.integer import exact_in_codes, float32_precision, integer_precision, linear_of_codes, rescale
from apq_mmdet.layers.matmul import FloatAttentionValueProduct, FloatQueryKeyProduct
from apq_mmdet.policy import Policy
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode

LAYERS = {
    "linear": (lambda: nn.Linear(37, 11), (5, 3, 37)),
    "no_bias": (lambda: nn.Linear(37, 11, bias=False), (9, 37)),
    "conv": (lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 9, 7)),
    "conv_no_bias": (lambda: nn.Conv2d(3, 4, 2, stride=2, bias=False), (1, 3, 8, 8)),
}


def calibrated(kind, bits, **weight):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make())
    formats = dict(all=dict(weight=weight)) if weight else {}
    quantize_model(model, Policy.from_dict(dict(w_bits=bits, a_bits=bits, formats=formats)))
    layer, x = model[0], torch.randn(shape)
    layer.quantizers["weight"].observe(layer.weight)
    layer.quantizers["input"].observe(x)
    for quantizer in layer.quantizers.values():
        quantizer.set_range_factor(0.9)
    return layer, x


def in_codes(layer, x):
    with torch.no_grad(), quantizer_mode(layer.quantizers.values(), QuantizerMode.CODES):
        return layer(x)


@pytest.mark.parametrize("weight", [{}, dict(granularity="channel"), dict(symmetric=True)], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("kind", LAYERS)
def test_product_of_codes_is_that_of_the_values(kind, bits, weight):
    layer, x = calibrated(kind, bits, **weight)
    oracle = copy.deepcopy(layer).double()
    with torch.no_grad():
        expected = oracle(x.double())
    # codes and scales are those of float32: only the epilogue and the float64 oracle's own codes may differ by rounding
    torch.testing.assert_close(in_codes(layer, x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 500, 400), (64, 1024, 96)], ids=str)
@pytest.mark.parametrize("bits", [4, 6])
def test_products_are_exact_integers(shape, bits):
    rows, depth, columns = shape
    assert exact_in_codes(depth, bits, bits)
    top = 2**bits - 1
    x = torch.randint(-top, top + 1, (rows, depth))
    w = torch.randint(-top, top + 1, (columns, depth))
    with integer_precision():
        product = nn.functional.linear(x.float(), w.float())
    assert torch.equal(product.long(), x @ w.t())


needs_int8_units = pytest.mark.skipif(not integer.INT8_UNITS, reason="this CPU has no units for int8 numbers")


@pytest.fixture(params=[pytest.param(True, marks=needs_int8_units), False], ids=["int8", "float"])
def products_in_int8(request, monkeypatch):
    """With and without int8 units: a list that gets an entry for each product on them."""
    seen = []
    if request.param:
        multiply = torch._int_mm
        monkeypatch.setattr(torch, "_int_mm", lambda *args: seen.append(True) or multiply(*args))
    monkeypatch.setattr(integer, "INT8_UNITS", request.param)
    return seen


@pytest.mark.parametrize("shape", [(300, 500, 400), (3, 1, 2), (3, 9, 1), (1, 1024, 96), (0, 8, 5)], ids=str)
def test_products_of_int8_numbers_are_exact_on_any_units(shape, products_in_int8):
    rows, depth, columns = shape
    x, w = torch.randint(-128, 128, (2, rows, depth)), torch.randint(-128, 128, (columns, depth))
    x[0, :1], w[:1] = -128, -128
    product = linear_of_codes(x.float(), w.float(), int8=True)
    assert product.dtype is torch.float32
    assert torch.equal(product.long(), x @ w.t())
    assert bool(products_in_int8) == (integer.INT8_UNITS and 1 not in (depth, columns))


def test_axes_of_one_element_may_have_any_stride(products_in_int8):
    x, w = torch.randint(-9, 10, (7, 32)), torch.randint(-9, 10, (1, 32))
    for left, right in ((x, w), (w, x), (w, w)):
        for stride in (0, 5):
            a, b = (t.float().as_strided(t.shape, (stride if len(t) == 1 else 32, 1)) for t in (left, right))
            assert torch.equal(linear_of_codes(a, b, int8=True).long(), left @ right.t())


@needs_int8_units
@pytest.mark.parametrize(
    ("bits", "formats", "int8"),
    [
        (2, {}, True),
        (4, dict(weight=dict(granularity="channel")), True),
        (7, {}, True),
        (8, dict(weight=dict(symmetric=True), input=dict(symmetric=True)), True),
        (8, dict(weight=dict(symmetric=True)), False),
    ],
    ids=str,
)
def test_int8_units_change_no_bit_of_a_layer(bits, formats, int8, monkeypatch):
    model = nn.Sequential(nn.Linear(37, 11))
    quantize_model(model, Policy.from_dict(dict(w_bits=bits, a_bits=bits, formats=dict(all=formats))))
    layer, x = model[0], torch.randn(5, 3, 37)
    for role, seen in (("weight", layer.weight), ("input", x)):
        layer.quantizers[role].observe(seen)
        layer.quantizers[role].set_range_factor(0.9)
    multiply, ran = torch._int_mm, []
    monkeypatch.setattr(torch, "_int_mm", lambda *args: ran.append(True) or multiply(*args))
    output = in_codes(layer, x)
    assert bool(ran) is int8
    monkeypatch.setattr(integer, "INT8_UNITS", False)
    assert torch.equal(in_codes(layer, x), output)


def test_a_kernel_that_rounds_off_is_not_used(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    saturated = torch.full((32, 32), 32 * 2**15 - 1, dtype=torch.int32)  # pairs of products in int16
    monkeypatch.setattr(torch, "_int_mm", lambda left, right: saturated, raising=False)
    assert not integer._has_int8_units()


def test_codes_of_eight_bits_are_int8_numbers_around_zero_only():
    model = nn.Sequential(nn.Linear(5, 3))
    quantize_model(model, Policy.from_dict(dict(w_bits=8, a_bits=8)))
    layer, x = model[0], torch.rand(7, 5)  # all positive: codes up to 255 with zero point 0
    for role, seen in (("weight", layer.weight), ("input", x)):
        layer.quantizers[role].observe(seen)
        layer.quantizers[role].set_range_factor(1.0)
    assert not layer.codes_are_int8
    with torch.no_grad():
        torch.testing.assert_close(in_codes(layer, x), layer(x), rtol=1e-5, atol=1e-6)
    symmetric = dict(all=dict(weight=dict(symmetric=True), input=dict(symmetric=True)))
    for bits, formats in ((7, {}), (8, symmetric)):
        model = nn.Sequential(nn.Linear(5, 3))
        quantize_model(model, Policy.from_dict(dict(w_bits=bits, a_bits=bits, formats=formats)))
        assert model[0].codes_are_int8


def test_the_bound():
    assert exact_in_codes(2**24 // (15 * 15), 4, 4)
    assert not exact_in_codes(2**24 // (15 * 15) + 1, 4, 4)
    assert exact_in_codes(4227, 6, 6)
    assert not exact_in_codes(12544, 6, 6)  # a box head's first layer


def test_deep_or_partly_float_layers_stay_with_values():
    layer, _ = calibrated("linear", 4)
    assert layer.may_take_codes
    assert not calibrated("linear", 4)[0].takes_codes  # by default
    del layer.quantizers["weight"]
    assert not layer.may_take_codes
    deep = nn.Sequential(nn.Linear(300, 2))
    quantize_model(deep, Policy.from_dict(dict(w_bits=8, a_bits=8)))
    assert not deep[0].may_take_codes


PRODUCTS = {
    "query_key": (FloatQueryKeyProduct, lambda: (torch.randn(4, 3, 7, 5), torch.randn(4, 3, 9, 5))),
    "attention_value": (FloatAttentionValueProduct, lambda: (torch.rand(4, 3, 7, 9), torch.randn(4, 3, 9, 5))),
}


def calibrated_product(kind, bits, formats=None, operands=None):
    make, some = PRODUCTS[kind]
    model = nn.Sequential(make(3))
    quantize_model(model, Policy.from_dict(dict(w_bits=8, a_bits=bits, formats=dict(all=formats or {}))))
    layer, operands = model[0], operands or some()
    for role, quantizer in layer.quantizers.items():
        quantizer.observe(operands[layer.roles.index(role)])
        quantizer.set_range_factor(0.9)
    return layer, operands


FORMATS = {
    "query_key": ({}, dict(query=dict(granularity="head")), dict(query=dict(symmetric=True), key=dict(symmetric=True))),
    "attention_value": ({}, dict(attention=dict(format="matthew", granularity="head"), value=dict(granularity="head"))),
}


@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize(("kind", "formats"), [(k, f) for k in PRODUCTS for f in FORMATS[k]], ids=str)
def test_attention_product_of_codes_is_that_of_the_values(kind, bits, formats):
    layer, operands = calibrated_product(kind, bits, formats)
    assert layer.may_take_codes
    with torch.no_grad(), quantizer_mode(layer.quantizers.values(), QuantizerMode.CODES):
        output = layer(*operands)
    # every code from the plain formula on float32 parameters; the sum is exact in integers
    codes = [q.encode(x).long() - q.per_element(q.zero_point, x) for q, x in by_role(layer, operands)]
    scales = [q.per_element(q.scale, x).double() for q, x in by_role(layer, operands)]
    right = codes[1].transpose(-2, -1) if kind == "query_key" else codes[1]
    expected = (codes[0] @ right).double() * scales[0] * scales[1]
    torch.testing.assert_close(output.double(), expected, rtol=2e-7, atol=0.0)


def by_role(layer, operands):
    return [(layer.quantizers[role], x) for role, x in zip(layer.roles, operands, strict=True)]


def test_attention_products_that_are_too_deep_multiply_values():
    depth = 2**24 // (255 * 255) + 1
    operands = torch.randn(2, 3, 7, depth), torch.randn(2, 3, 6, depth)
    layer, operands = calibrated_product("query_key", 8, operands=operands)
    with torch.no_grad():
        values = layer(*operands)
        with quantizer_mode(layer.quantizers.values(), QuantizerMode.CODES):
            assert torch.equal(layer(*operands), values)


@pytest.mark.parametrize("attention", [dict(format="row_affine"), dict(format="log_sqrt2"), None], ids=str)
def test_attention_products_in_other_formats_have_no_codes_to_multiply(attention):
    assert not calibrated_product("attention_value", 4, dict(attention=attention))[0].may_take_codes


def test_deconvolutions_multiply_values():
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2))
    quantize_model(model, Policy.from_dict({}))
    assert [layer.depth for _, layer in quantized_layers(model)] == [None]


def precisions():
    backends = torch.backends
    kinds = (backends.mkldnn.matmul, backends.mkldnn.conv, backends.cuda.matmul, backends.cudnn.conv)
    return [kind.fp32_precision for kind in kinds]


def test_precision_is_narrow_for_codes_full_around_them_and_put_back():
    before = precisions()
    with float32_precision(torch.device("cpu")):
        assert precisions() == ["ieee"] * 4
        with integer_precision():
            assert precisions() == ["bf16", "bf16", "tf32", "tf32"]
        assert precisions() == ["ieee"] * 4
    assert precisions() == before
    with pytest.raises(KeyError), integer_precision():
        raise KeyError
    assert precisions() == before


def test_a_calibration_is_one_of_float32(monkeypatch):
    seen = []
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: seen.append(precisions()) or x)
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    quantize_model(model, recipe("minmax").policy)
    calibrate(model, [torch.randn(3, 4)], recipe("minmax"))
    assert seen == [["ieee"] * 4]


def test_rescale():
    product = torch.tensor([[2.0, 3.0]])
    scale, bias = torch.tensor([10.0, 100.0]), torch.tensor([1.0, 2.0])
    assert torch.equal(rescale(product.clone(), scale, bias), torch.tensor([[21.0, 302.0]]))
    assert torch.equal(rescale(product, scale, None), torch.tensor([[20.0, 300.0]]))
