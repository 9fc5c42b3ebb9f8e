"""Calibrations that are broken off, and inputs that are unusual."""

import pytest
import torch
from helpers import build_swin, recipe, short_grids
from torch import nn

from apq_mmdet.calibration import FeatureTask, calibrate
from apq_mmdet.calibration.blocks import partition
from apq_mmdet.errors import CalibrationError, UncalibratedError
from apq_mmdet.layers import quantize_model, quantizers_of

IMAGES = [torch.randn(1, 3, 57, 41), torch.randn(1, 3, 33, 64)]


def test_samples_of_different_batch_sizes():
    """A block's calls are taken apart alike, whatever their batch."""
    settings = recipe("apq", search=dict(grids=short_grids(2), rounds=1))
    for sizes in ((1, 2), (2, 1)):
        model = build_swin()
        quantize_model(model, settings.policy)
        report = calibrate(model, [torch.randn(n, 3, 57, 41) for n in sizes], settings)
        assert report.blocks
        assert all(quantizer.calibrated for quantizer in quantizers_of(model))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_what_was_broken_off_does_not_count_as_calibrated(error, monkeypatch):
    def fail(*_):
        raise error

    settings = recipe("apq", search=dict(grids=short_grids(4)))
    model = build_swin()
    quantize_model(model, settings.policy)
    monkeypatch.setattr("apq_mmdet.calibration.search._best_candidate", fail)
    with pytest.raises(error):
        calibrate(model, IMAGES, settings)
    assert not any(quantizer.calibrated for quantizer in quantizers_of(model))
    with pytest.raises(UncalibratedError):
        model(IMAGES[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_without_a_range_are_an_error_with_the_name(bad):
    settings = recipe("minmax")
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_model(model, settings.policy)
    with torch.no_grad():
        model[1].weight[0, 0] = bad
    with pytest.raises(CalibrationError, match=r"1 \(weight\): NaN or infinite values were observed"):
        calibrate(model, [torch.randn(2, 4)], settings)


def test_the_training_mode_of_each_module_is_what_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    model[1].eval()  # frozen
    quantize_model(model, recipe("minmax").policy)
    calibrate(model, [torch.randn(2, 4)], recipe("minmax"))
    assert [module.training for module in model] == [True, False, True]


class Unheard(nn.Module):
    """A block whose second output counts nothing."""

    def __init__(self):
        super().__init__()
        self.heard, self.unheard = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.heard(x), self.unheard(x)


class FirstOutput(FeatureTask):
    def loss(self, student, teacher, context):
        return super().loss(student[0], teacher[0], context)


@pytest.mark.parametrize("metric", ["module", "block"])
def test_layers_without_a_say_keep_their_observed_ranges(metric, monkeypatch):
    """Their errors are zero for every candidate, and the lowest would clip them for nothing."""
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Unheard])
    settings = recipe("apq", search=dict(metric=metric, objective=dict(type="hessian"), grids=short_grids(13)))
    model = Unheard()
    quantize_model(model, settings.policy)
    factors = calibrate(model, [torch.randn(30, 4)], settings, FirstOutput()).blocks[0].factors
    assert (factors["unheard.weight"], factors["unheard.input"]) == (1.0, 1.0)
    assert (factors["heard.weight"], factors["heard.input"]) != (1.0, 1.0)


class Shared(nn.Module):
    """One linear layer in two places."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.again = nn.Sequential(self.first[0])

    def forward(self, x):
        return self.again(self.first(x))


@pytest.mark.parametrize("name", ["apq_plus", "erq", "brecq"])
def test_a_layer_that_has_two_names_is_one_block(name):
    settings = recipe(name, w_bits=3, a_bits=3)
    model = Shared()
    quantize_model(model, settings.policy)
    assert list(partition(model)) == ["first.0"]
    report = calibrate(model, [torch.randn(9, 4) for _ in range(2)], settings)
    assert [block.block for block in report.blocks] == ["first.0"]


@pytest.mark.parametrize("name", ["apq_plus", "isvit"])
def test_a_linear_layer_takes_vectors(name):
    settings = recipe(name)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(4) for _ in range(3)], settings)
    assert model(torch.randn(4)).shape == (3,)
