"""What all formats with non-linear codes have in common, each against its formula in float64."""

import copy
import math

import pytest
import torch

from apq_mmdet.errors import CalibrationError
from apq_mmdet.quantizers import QuantizerMode
from apq_mmdet.registry import QUANTIZERS

BITS = (2, 3, 4, 6, 8)
GELU_MINIMUM = 0.16997124254703522


def log_oracle(a, scale, octaves, bits):
    """Unrounded codes, and the value of each code, of one group."""
    codes = torch.arange(2**bits, dtype=torch.float64)
    table = scale * 2 ** (-codes * octaves)
    table[-1] = 0
    return -torch.log2(a / scale) / octaves, table


def log_sqrt2(a, top, bits, variant):
    codes = torch.arange(2**bits, dtype=torch.float64)
    table = top * 2 ** -torch.ceil(codes / 2) * (1 + (math.sqrt(2) - 1) * (codes % 2))
    table[-1] = 0
    return -2 * torch.log2(a / top), table


def adaptive_log(a, top, bits, variant):
    return log_oracle(a, top, variant / 37, bits)


def shift_log2(a, top, bits, variant):
    low, high = math.log2(variant), math.log2(top + variant)
    step = (high - low) / (2**bits - 1)
    table = 2 ** (low + step * torch.arange(2**bits, dtype=torch.float64)) - variant
    return (torch.log2(a + variant) - low) / step, table


def twin_softmax(a, top, bits, variant):
    half, split = 2 ** (bits - 1), 2.0**-variant
    steps = torch.arange(half, dtype=torch.float64) / (half - 1)
    position = torch.where(a < split, a * (half - 1) / split, a * (half - 1))
    return torch.where(a < split, position, position + half), torch.cat([split * steps, steps])


def twin_gelu(x, top, bits, variant):
    half = 2 ** (bits - 1)
    small, large = GELU_MINIMUM / half, top / (half - 1)
    n = torch.arange(half, dtype=torch.float64)
    return torch.where(x < 0, x / small, x / large) + half, torch.cat([(n - half) * small, n * large])


ORACLES = {f.__name__: f for f in (log_sqrt2, adaptive_log, shift_log2, twin_softmax, twin_gelu)}
SOFTMAX = [name for name in ORACLES if name != "twin_gelu"]


def data(name):
    """[windows, heads, rows, columns] with zeros, and another maximum in each head."""
    x = 4 * torch.randn(6, 3, 9, 9) * torch.tensor([0.5, 1.0, 1.5]).view(1, 3, 1, 1)
    x = torch.nn.functional.gelu(x) if name == "twin_gelu" else x.softmax(-1)
    x[0, :, 0, 0] = 0
    return x


def build(name, bits, groups=1, x=None, factor=1.0, variant=None):
    quantizer = QUANTIZERS.module_dict[name](bits, axis=1, groups=groups)
    quantizer.observe(data(name) if x is None else x)
    quantizer.set_range_factor(factor, variant)
    return quantizer


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", [1, 3], ids=["tensor", "head"])
@pytest.mark.parametrize("name", ORACLES)
def test_codes_and_values_follow_the_float64_formula(name, groups, bits):
    x = data(name)
    for variant in QUANTIZERS.module_dict[name].variants or (None,):
        quantizer = build(name, bits, groups, x, 0.9, variant)
        codes, values = quantizer.encode(x), quantizer(x)
        for part in [slice(g, g + 1) for g in range(3)] if groups == 3 else [slice(0, 3)]:
            a = x[:, part].double()
            position, table = ORACLES[name](a, 0.9 * float(a.max()), bits, variant)
            want = position.round().clamp(0, 2**bits - 1)
            sure = (position - position.floor() - 0.5).abs() > 2e-3  # ties of float32 and float64
            sure |= position.isinf()
            assert sure.double().mean() > 0.9
            assert torch.equal(codes[:, part][sure], want[sure].int())
            torch.testing.assert_close(values[:, part].double()[sure], table[want[sure].long()], rtol=3e-5, atol=1e-7)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ORACLES)
def test_three_views_agree_and_quantizing_again_changes_nothing(name, bits):
    x = data(name)
    for variant in QUANTIZERS.module_dict[name].variants or (None,):
        quantizer = build(name, bits, 3, x, 1.0, variant)
        for view in (x, x.transpose(0, 2), x[:, :, 1:, ::2]):
            assert torch.equal(quantizer(view), quantizer.decode(quantizer.encode(view)))
        values = quantizer(x)
        if name != "twin_softmax":  # its values next to the split may be of the other range
            torch.testing.assert_close(quantizer(values), values, rtol=1e-6, atol=1e-9)
        codes = quantizer.encode(x)
        assert int(codes.min()) >= 0
        assert int(codes.max()) <= 2**bits - 1


@pytest.mark.parametrize("name", ORACLES)
def test_zero_stays_zero_and_nan_stays_nan(name):
    x = torch.tensor([0.0, -0.0, math.nan, -0.2]).view(1, 1, 4)
    values = build(name, 4)(x).flatten()
    assert values[:2].tolist() == [0.0, 0.0]
    assert values[2].isnan()
    assert values[3].item() == pytest.approx(-GELU_MINIMUM if name == "twin_gelu" else 0.0)
    nothing = torch.zeros(1, 3, 4)
    assert torch.equal(build(name, 4, 3, nothing)(nothing), nothing)


@pytest.mark.parametrize("name", ORACLES)
def test_straight_through_gradient(name):
    quantizer = build(name, 3, x=torch.tensor([[0.0], [1.0]]))
    x = torch.tensor([[-5.0], [0.3], [1.0], [9.0]], requires_grad=True)
    values = quantizer(x)
    (2 * values).sum().backward()
    assert torch.equal(values.detach(), quantizer(x.detach()))
    assert x.grad.flatten().tolist() == [0.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize("name", ORACLES)
def test_the_state_holds_all_parameters(name):
    variants = QUANTIZERS.module_dict[name].variants
    x = data(name)
    quantizer = build(name, 4, 3, x, 0.8, variants[-1] if variants else None)
    fresh = QUANTIZERS.module_dict[name](4, axis=1, groups=3)
    assert ("variant" in fresh.state_dict()) == bool(variants)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(x), quantizer(x))
    assert torch.equal(copy.deepcopy(quantizer)(x), quantizer(x))


@pytest.mark.parametrize("name", ORACLES)
def test_variants_and_range_factor_matter_where_they_are_said_to(name):
    quantizer, x = build(name, 4), data(name)
    default = quantizer(x)
    others = []
    for variant in quantizer.variants:
        quantizer.set_range_factor(1.0, variant)
        assert quantizer.variant.tolist() == pytest.approx([variant])
        others.append(torch.equal(quantizer(x), default))
    assert sum(others) == bool(quantizer.variants)  # the default one is among them, the others differ from it
    quantizer.set_range_factor(0.8)
    assert torch.equal(quantizer(x), default) != quantizer.ranged


def test_affine_formats_have_no_variant():
    for name in ("affine", "matthew"):
        keys = set(build(name, 4, x=torch.tensor([[0.0], [1.0]])).state_dict())
        assert keys == {"scale", "zero_point", "bits", "format", "calibrated"}


@pytest.mark.parametrize(("name", "value"), [*((name, -1e-3) for name in SOFTMAX), ("twin_gelu", -0.3)])
def test_impossible_values_are_refused(name, value):
    with pytest.raises(CalibrationError, match="GELU" if name == "twin_gelu" else "softmax"):
        build(name, 4, x=torch.tensor([[value], [1.0]]))


@pytest.mark.parametrize("name", ORACLES)
def test_symmetric_and_products_of_codes_are_refused(name):
    with pytest.raises(ValueError, match="unsigned"):
        QUANTIZERS.module_dict[name](4, symmetric=True)
    quantizer = build(name, 4)
    quantizer.mode = QuantizerMode.CODES
    with pytest.raises(TypeError, match="no linear format"):
        quantizer(data(name))
