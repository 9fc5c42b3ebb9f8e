import pytest
import torch

from apq_mmdet.errors import CalibrationError
from apq_mmdet.quantizers import RowAffineQuantizer


def calibrated(bits, factors=(1.0,)):
    quantizer = RowAffineQuantizer(bits, axis=1, groups=len(factors))
    ends = (torch.zeros(len(factors)), torch.ones(len(factors)))
    steps = [quantizer.parameters_for(*ends, f)[0] for f in factors]
    quantizer.set_parameters(torch.stack([s[g] for g, s in enumerate(steps)]), torch.zeros(len(factors)))
    return quantizer


def attention(*shape, sharpness=3.0):
    return (sharpness * torch.randn(*shape)).softmax(-1)


def formula(a, bits, factor):
    """A' of one row in plain float64."""
    step = factor * max(a) / (2**bits - 1)
    codes = [min(round(x / step), 2**bits - 1) for x in a]
    rest = 1 - step * sum(codes)
    return [step * c + rest / len(a) for c in codes]


def test_by_hand():
    quantizer = calibrated(2)
    a = torch.tensor([[0.6, 0.25, 0.1, 0.05]])
    assert quantizer.row_steps(a).item() == pytest.approx(0.2)
    assert quantizer.encode(a).tolist() == [[3, 1, 0, 0]]  # 0.6, 0.2: a fifth is left for four entries
    assert quantizer(a).tolist()[0] == pytest.approx([0.65, 0.25, 0.05, 0.05])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("factors", [(1.0,), (0.6, 0.9, 1.1)])
def test_values_against_the_plain_formula_in_float64(bits, factors):
    a = attention(2, 3, 5, 7).double()
    quantizer = calibrated(bits, factors).double()
    got = quantizer(a)
    for b in range(2):
        for head in range(3):
            factor = float(quantizer.scale[head % len(factors)]) * (2**bits - 1)
            for row in range(5):
                want = formula(a[b, head, row].tolist(), bits, factor)
                assert got[b, head, row].tolist() == pytest.approx(want, abs=1e-12)


def test_codes_and_values_agree():
    a = attention(2, 3, 5, 49)
    quantizer = calibrated(4, (0.7, 1.0, 1.1))
    codes = quantizer.encode(a)
    assert codes.min() >= 0
    assert codes.max() == 15
    assert torch.equal(quantizer.decode_on(codes, quantizer.row_steps(a)), quantizer(a))
    with pytest.raises(TypeError, match="decode_on"):
        quantizer.decode(codes)


def test_product_is_that_of_integer_codes_and_a_rank_one_term():
    a, v = attention(1, 2, 6, 6).double(), torch.randn(1, 2, 6, 4).double()
    quantizer = calibrated(3, (0.8, 1.0)).double()
    codes, steps = quantizer.encode(a), quantizer.row_steps(a)
    rest = 1 - steps * codes.sum(-1, keepdim=True)
    want = steps * (codes.double() @ v) + rest * v.mean(2, keepdim=True)
    assert torch.allclose(quantizer(a) @ v, want, atol=1e-12, rtol=0)


def test_rows_keep_their_sum():
    assert torch.allclose(calibrated(2)(attention(3, 2, 9, 9)).sum(-1), torch.ones(3, 2, 9), atol=1e-6)


def test_gradient_is_straight_through_and_blind_to_a_rows_sum():
    a = torch.tensor([[0.6, 0.25, 0.1, 0.05]], requires_grad=True)
    calibrated(2, (0.5,))(a).backward(torch.tensor([[4.0, 0.0, 0.0, 0.0]]))
    # the first entry is beyond the range, and all bear what the row's sum lacks: 4 - 1 and -1
    assert a.grad.tolist() == [[0.0, -1.0, -1.0, -1.0]]


def test_a_row_of_zeros_is_spread_evenly_even_where_tiny_numbers_are_flushed():
    torch.set_flush_denormal(True)
    try:
        assert calibrated(4)(torch.zeros(2, 4)).tolist() == [[0.25] * 4] * 2
    finally:
        torch.set_flush_denormal(False)


def test_refuses_what_is_no_attention_map():
    with pytest.raises(ValueError, match="symmetric"):
        RowAffineQuantizer(4, symmetric=True)
    quantizer = RowAffineQuantizer(4)
    quantizer.observe(torch.tensor([-0.1, 1.0]))
    with pytest.raises(CalibrationError, match="the row_affine format quantizes softmax outputs; values below 0"):
        quantizer.set_range_factor(1.0)


def test_observed_range_changes_nothing():
    quantizer = RowAffineQuantizer(4)
    quantizer.use_observer("percentile")
    quantizer.observe(attention(4, 4))
    quantizer.set_range_factor(1.0)
    assert quantizer.scale.item() == pytest.approx(1 / 15)
