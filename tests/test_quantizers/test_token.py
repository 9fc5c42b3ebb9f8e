import pytest
import torch

from apq_mmdet.quantizers import TokenAffineQuantizer


def calibrated(bits, factor=1.0):
    quantizer = TokenAffineQuantizer(bits)
    quantizer.observe(torch.randn(3, 4))
    quantizer.set_range_factor(factor)
    return quantizer


def formula(x, bits, share):
    """x' of one token in plain float64; share: of what the token spans that one step takes."""
    low, high, top = min(x), max(x), 2**bits - 1
    step = share * (high - low)
    start = (low + high) / 2 - step * top / 2
    return [start + step * min(max(round((v - start) / step), 0), top) for v in x]


def test_by_hand():
    quantizer = calibrated(2)
    x = torch.tensor([[-1.0, 0.1, 1.9, 2.0], [0.3, 0.3, 0.3, 0.3]])
    low, step = quantizer.grid(x)
    assert (low[0].item(), step[0].item()) == pytest.approx((-1, 1))
    assert quantizer.encode(x).tolist() == [[0, 1, 3, 3], [0, 0, 0, 0]]
    assert quantizer(x).tolist()[0] == pytest.approx([-1, 0, 2, 2])
    assert torch.equal(quantizer(x)[1], x[1])  # nothing sets its values apart


def test_a_smaller_range_lies_around_the_middle():
    x = torch.tensor([[0.0, 1.0, 9.0, 10.0]])
    assert calibrated(2, 0.6)(x).tolist()[0] == pytest.approx([2, 2, 8, 8])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.1])
def test_values_against_the_plain_formula_in_float64(bits, factor):
    x = torch.randn(2, 5, 7).double()
    quantizer = calibrated(bits, factor).double()
    got = quantizer(x)
    for b in range(2):
        for token in range(5):
            want = formula(x[b, token].tolist(), bits, float(quantizer.scale))
            assert got[b, token].tolist() == pytest.approx(want, abs=1e-12)


def test_codes_and_values_agree():
    x = 3 + torch.randn(2, 9, 33)
    quantizer = calibrated(3, 0.8)
    codes = quantizer.encode(x)
    assert (codes.min(), codes.max()) == (0, 7)
    assert torch.equal(quantizer.decode_on(codes, *quantizer.grid(x)), quantizer(x))
    with pytest.raises(TypeError, match="decode_on"):
        quantizer.decode(codes)


def test_product_is_that_of_integer_codes_and_a_rank_one_term():
    x, weight = torch.randn(6, 5).double(), torch.randn(4, 5).double()
    quantizer = calibrated(3, 0.9).double()
    low, step = quantizer.grid(x)
    want = step * (quantizer.encode(x).double() @ weight.T) + low * weight.sum(1)
    assert torch.allclose(quantizer(x) @ weight.T, want, atol=1e-12, rtol=0)


def test_tokens_do_not_see_each_other():
    x = torch.randn(4, 8)
    quantizer = calibrated(3)
    alone = torch.cat([quantizer(token[None]) for token in x])
    assert torch.equal(quantizer(x), alone)


def test_gradient_is_straight_through_inside_the_range():
    x = torch.tensor([[0.0, 4.0, 6.0, 10.0]], requires_grad=True)
    calibrated(2, 0.5)(x).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match="symmetric"):
        TokenAffineQuantizer(4, symmetric=True)
    with pytest.raises(ValueError, match="groups"):
        TokenAffineQuantizer(4, groups=2)


def test_observed_range_changes_nothing():
    quantizer = TokenAffineQuantizer(4)
    quantizer.use_observer("percentile")
    quantizer.observe(100 * torch.randn(4, 40))
    quantizer.set_range_factor(1.0)
    assert quantizer.scale.item() == pytest.approx(1 / 15)
