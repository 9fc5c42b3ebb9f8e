import pytest
import torch

from apq_mmdet.errors import CalibrationError
from apq_mmdet.quantizers import MatthewQuantizer


def attention():
    return (4 * torch.randn(3, 2, 9, 9)).softmax(-1)


@pytest.mark.parametrize("bits", range(2, 9))
def test_all_codes_on_zero_to_factor_times_maximum(bits):
    a = attention()
    quantizer = MatthewQuantizer(bits, axis=1, groups=2)
    quantizer.observe(a)
    quantizer.set_range_factor(0.95)
    maximum = a.amax((0, 2, 3)).double()
    torch.testing.assert_close(quantizer.scale.double(), 0.95 * maximum / (2**bits - 1), rtol=1e-6, atol=0)
    assert quantizer.zero_point.tolist() == [0, 0]
    codes = quantizer.encode(a)
    assert codes.amax((0, 2, 3)).tolist() == [2**bits - 1] * 2
    scale = quantizer.scale.double().view(1, 2, 1, 1)
    plain = (a.double() / scale).round().clamp(0, 2**bits - 1) * scale
    assert ((quantizer(a).double() - plain).abs() > 1e-6).float().mean() < 0.01  # ties of float32 and float64


def test_the_head_is_never_clipped_by_more_than_a_tenth():
    quantizer = MatthewQuantizer(4)
    quantizer.observe(attention())
    quantizer.set_range_factor(0.3)
    top = float(quantizer.scale) * 15
    assert top == pytest.approx(0.9 * float(quantizer.observed[1]), rel=1e-6)


def test_negative_values_are_no_attention_map():
    quantizer = MatthewQuantizer(4)
    quantizer.observe(torch.tensor([-0.1, 0.5]))
    with pytest.raises(CalibrationError, match="softmax"):
        quantizer.set_range_factor(1.0)


def test_symmetric_is_refused():
    with pytest.raises(ValueError, match="unsigned"):
        MatthewQuantizer(4, symmetric=True)
