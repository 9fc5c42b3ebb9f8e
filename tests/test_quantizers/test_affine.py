import copy

import pytest
import torch

from apq_mmdet.errors import UncalibratedError
from apq_mmdet.quantizers import AffineQuantizer, QuantizerMode, quantizer_mode

BITS = range(2, 9)


def oracle(x, low, high, factor, bits, symmetric):
    """Codes, scale and values of one group by the textbook formula, in float64."""
    x, low, high = x.double(), min(float(low), 0.0), max(float(high), 0.0)
    if symmetric:
        scale, zero = factor * max(-low, high) / (2 ** (bits - 1) - 1), 0
        first = -(2 ** (bits - 1))
    else:
        scale = factor * (high - low) / (2**bits - 1)
        zero, first = round(-factor * low / scale), 0
    scale = float(torch.tensor(scale, dtype=torch.float32))  # the scale is stored in float32
    codes = (torch.round(x / scale) + zero).clamp(first, first + 2**bits - 1)
    return codes, scale, (codes - zero) * scale


def off_ties(x, scale):
    """Elements whose float32 quotient cannot round to another integer than the float64 one."""
    fraction = (x.double() / scale).frac().abs()
    return (fraction - 0.5).abs() > 1e-4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize(("axis", "groups"), [(0, 1), (0, 6), (0, 3), (1, 5), (-1, 7)])
def test_codes_and_values_follow_the_float64_formula(bits, symmetric, axis, groups):
    x = torch.randn(6, 5, 7) * 3 + 1
    quantizer = AffineQuantizer(bits, axis, groups, symmetric)
    quantizer.observe(x)
    quantizer.set_range_factor(0.85)
    codes, values = quantizer.encode(x).movedim(axis, 0), quantizer(x).movedim(axis, 0)
    moved = x.movedim(axis, 0)
    size = moved.shape[0] // groups if groups > 1 else moved.shape[0]
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        want_codes, scale, want = oracle(moved[part], moved[part].min(), moved[part].max(), 0.85, bits, symmetric)
        sure = off_ties(moved[part], scale)
        assert sure.float().mean() > 0.9
        assert torch.equal(codes[part].double()[sure], want_codes[sure])
        torch.testing.assert_close(values[part].double()[sure], want[sure], rtol=1e-6, atol=1e-6)


def test_hand_computed():
    quantizer = AffineQuantizer(2)
    quantizer.observe(torch.tensor([-1.0, 2.0]))
    quantizer.set_range_factor(1.0)
    assert quantizer.scale.tolist() == [1.0]
    assert quantizer.zero_point.tolist() == [1]
    x = torch.tensor([-5.0, -1.0, -0.4, 0.6, 1.6, 9.0])
    assert quantizer.encode(x).tolist() == [0, 0, 1, 2, 3, 3]
    assert quantizer(x).tolist() == [-1.0, -1.0, 0.0, 1.0, 2.0, 2.0]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("groups", [1, 8])
def test_three_views_agree_and_quantizing_again_changes_nothing(bits, groups):
    x = torch.randn(8, 1000)
    quantizer = AffineQuantizer(bits, 0, groups)
    quantizer.observe(x)
    quantizer.set_range_factor(0.9)
    values = quantizer(x)
    assert torch.equal(values, quantizer.decode(quantizer.encode(x)))
    assert torch.equal(quantizer.encode(values), quantizer.encode(x))
    assert torch.equal(quantizer(values), values)


@pytest.mark.parametrize("x", [torch.zeros(4), torch.full((4,), 3.0), torch.full((4,), -2.0)], ids=["0", "3", "-2"])
def test_constant_tensors(x):
    quantizer = AffineQuantizer(4)
    quantizer.observe(x)
    quantizer.set_range_factor(1.0)
    torch.testing.assert_close(quantizer(x), x)
    assert quantizer(torch.zeros(2)).tolist() == [0.0, 0.0]


def test_straight_through_gradient():
    quantizer = AffineQuantizer(4)
    quantizer.set_parameters(torch.tensor([1.0]), torch.tensor([0]))
    x = torch.tensor([-3.0, 0.2, 7.7, 99.0], requires_grad=True)
    values = quantizer(x)
    values.sum().backward()
    assert torch.equal(values.detach(), quantizer(x.detach()))
    assert x.grad.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_observed_range_grows_and_ignores_empty_tensors():
    quantizer = AffineQuantizer(4)
    with quantizer_mode([quantizer], QuantizerMode.OBSERVE):
        for x in (torch.tensor([1.0, 2.0]), torch.empty(0), torch.tensor([-3.0])):
            assert quantizer(x) is x
    assert [float(v) for v in quantizer.observed] == [-3.0, 2.0]


def test_uncalibrated_is_refused():
    with pytest.raises(UncalibratedError, match="quantize_det"):
        AffineQuantizer(4)(torch.ones(1))


def test_copies_and_inference_buffers_use_their_own_parameters():
    quantizer = AffineQuantizer(4)
    for scale in (0.1, 0.3):
        quantizer.set_parameters(torch.tensor([scale]), torch.tensor([8]))
    x = torch.randn(50) * 3
    quantizer(x)
    copied, other = copy.deepcopy(quantizer), AffineQuantizer(4)
    other.set_parameters(torch.tensor([0.3]), torch.tensor([0]))
    copied.load_state_dict(other.state_dict())
    assert torch.equal(copied(x), copied.decode(copied.encode(x)))
    with torch.inference_mode():
        made_here = AffineQuantizer(4)
        for zero_point in (8, 0):
            made_here.set_parameters(torch.tensor([0.3]), torch.tensor([zero_point]))
            assert torch.equal(made_here(x), made_here.decode(made_here.encode(x)))


def test_copies_start_without_what_a_search_holds_on_to():
    quantizer = AffineQuantizer(4)
    quantizer.set_parameters(torch.tensor([1.0]), torch.tensor([0]))
    quantizer.fixed = torch.full((3,), 9.0)
    x = torch.tensor([0.2, 1.2, 2.2])
    assert copy.deepcopy(quantizer)(x).tolist() == [0.0, 1.0, 2.0]
    assert quantizer(x) is quantizer.fixed


def test_modes_end_with_their_context_whatever_happens_in_it():
    quantizers = [AffineQuantizer(4), AffineQuantizer(4)]
    quantizers[1].mode = QuantizerMode.CODES
    with pytest.raises(KeyError), quantizer_mode(quantizers, QuantizerMode.FLOAT):
        raise KeyError
    assert [quantizer.mode for quantizer in quantizers] == [QuantizerMode.QUANTIZE, QuantizerMode.CODES]


def test_what_was_made_for_parameters_goes_with_them():
    """Bounds of codes follow a zero point that is written to in place, as loading does."""
    quantizer = AffineQuantizer(2)
    quantizer.set_parameters(torch.ones(1), torch.tensor([1], dtype=torch.int32))
    x = torch.tensor([-9.0, 9.0])
    assert quantizer(x).tolist() == [-1.0, 2.0]
    quantizer.zero_point.fill_(3)
    assert quantizer(x).tolist() == [-3.0, 0.0]


def test_a_quantizer_that_is_reset_quantizes_again_once_it_is_calibrated():
    quantizer = AffineQuantizer(2)
    quantizer.mode, quantizer.fixed = QuantizerMode.FLOAT, torch.zeros(1)
    quantizer.reset()
    with pytest.raises(UncalibratedError):
        quantizer(torch.zeros(1))
    quantizer.set_parameters(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    assert quantizer(torch.tensor([1.4])).tolist() == [1.0]
