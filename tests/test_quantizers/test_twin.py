import pytest
import torch

from apq_mmdet.quantizers import TwinGeluQuantizer, TwinSoftmaxQuantizer


def test_twin_softmax_by_hand():
    quantizer = TwinSoftmaxQuantizer(3)
    quantizer.observe(torch.tensor([0.0, 0.9]))
    quantizer.set_range_factor(1.0, 2.0)  # s = 1/4: steps of 1/12 below it and 1/3 above
    assert quantizer.scale.item() == pytest.approx(1 / 3)
    a = torch.tensor([0.0, 0.04, 0.05, 0.24, 0.25, 0.49, 0.51, 1.0, 1.3])
    assert quantizer.encode(a).tolist() == [0, 0, 1, 3, 5, 5, 6, 7, 7]
    want = [0.0, 0.0, 1 / 12, 1 / 4, 1 / 3, 1 / 3, 2 / 3, 1.0, 1.0]
    assert quantizer(a).tolist() == pytest.approx(want)


def test_twin_gelu_by_hand():
    quantizer = TwinGeluQuantizer(3)
    quantizer.observe(torch.tensor([-0.17, 6.0]))
    quantizer.set_range_factor(0.5)  # steps of 1 from zero to 3, and of 0.17 / 4 down to -0.17
    x = torch.tensor([-0.17, -0.09, -0.03, -0.01, 0.0, 0.4, 0.6, 3.2, 6.0])
    assert quantizer.encode(x).tolist() == [0, 2, 3, 4, 4, 4, 5, 7, 7]
    want = [-0.16997124, -0.08498562, -0.04249281, 0.0, 0.0, 0.0, 1.0, 3.0, 3.0]
    assert quantizer(x).tolist() == pytest.approx(want)
