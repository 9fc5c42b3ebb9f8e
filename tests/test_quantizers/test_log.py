import pytest
import torch

from apq_mmdet.quantizers import AdaptiveLogQuantizer, LogSqrt2Quantizer, ShiftLog2Quantizer


def calibrated(quantizer, *arguments):
    quantizer.observe(torch.tensor([0.0, 1.0]))
    quantizer.set_range_factor(1.0, *arguments)
    return quantizer


def test_log_sqrt2_by_hand():
    quantizer = calibrated(LogSqrt2Quantizer(3))
    a = torch.tensor([1.0, 0.5, 0.25, 0.125, 2**-3.5, 2**-9, 0.0])
    assert quantizer.encode(a).tolist() == [0, 2, 4, 6, 7, 7, 7]
    assert quantizer(a).tolist() == [1.0, 0.5, 0.25, 0.125, 0.0, 0.0, 0.0]  # the last code is zero
    assert quantizer(torch.tensor(0.7)).item() == pytest.approx(0.5**0.5)


def test_adaptive_log_with_base_two_by_hand():
    quantizer = calibrated(AdaptiveLogQuantizer(2))
    a = torch.tensor([1.0, 0.5, 0.25, 0.125, 0.0])
    assert quantizer.encode(a).tolist() == [0, 1, 2, 3, 3]
    assert quantizer(a).tolist() == [1.0, 0.5, 0.25, 0.0, 0.0]


def test_adaptive_log_base_is_two_to_q_over_37():
    quantizer = calibrated(AdaptiveLogQuantizer(4), 60.0)
    codes = torch.tensor([0, 1, 2])
    ratio = 2 ** (60 / 37)
    assert quantizer.decode(codes).tolist() == pytest.approx([1.0, 1 / ratio, 1 / ratio**2], rel=1e-6)


def test_shift_log2_by_hand():
    quantizer = calibrated(ShiftLog2Quantizer(2), 1.0)
    assert quantizer.scale.item() == pytest.approx(1 / 3)  # u from log2(1) to log2(2) in three steps
    want = [0.0, 2 ** (1 / 3) - 1, 2 ** (2 / 3) - 1, 1.0]
    assert quantizer.decode(torch.arange(4)).tolist() == pytest.approx(want, rel=1e-6)
    assert quantizer.encode(torch.tensor([0.0, 0.1, 0.2, 0.5, 0.9, 2.0])).tolist() == [0, 0, 1, 2, 3, 3]
