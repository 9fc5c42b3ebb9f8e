"""Where a calibration takes gradients, and what it refuses to take them at."""

import pytest
import torch
from helpers import build_swin, recipe, short_grids
from torch import nn

from apq_mmdet.calibration import FeatureTask, calibrate
from apq_mmdet.calibration.blocks import partition
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers import quantize_model, quantizers_of

IMAGES = [torch.randn(1, 3, 57, 41), torch.randn(1, 3, 33, 64), torch.randn(1, 3, 57, 41)]


def quantized_swin(settings):
    torch.manual_seed(3)
    model = build_swin()
    quantize_model(model, settings.policy)
    return model


@pytest.mark.parametrize(
    ("changes", "weighed"),
    [
        ({}, False),
        (dict(compensation=dict(weighted=True)), True),
        (dict(reconstruction=dict(weighting="hessian", iterations=1)), True),
        (dict(reconstruction=dict(weighting="none", iterations=1)), False),
        (dict(search=dict(objective=dict(type="mse", eliminate=0.1))), False),
        (dict(search=dict(objective=dict(type="mse", eliminate=0.1, eliminate_by="gradient"))), True),
        (
            dict(search=dict(objectives=dict(one=dict(pattern="stages.0.blocks.1", type="hessian")))),
            ["stages.0.blocks.1"],
        ),
    ],
)
def test_gradients_are_taken_where_something_weighs_errors_by_them(changes, weighed, monkeypatch):
    search = dict(objective=dict(type="mse"), metric="module", rounds=1, grids=short_grids(2)) | changes.get(
        "search", {}
    )
    settings = recipe("minmax", **{**changes, "search": search})
    passes, taken = [], set()
    student, add_grads = FeatureTask.student, CaptureStore.add_grads
    monkeypatch.setattr(FeatureTask, "student", lambda *args: passes.append(1) or student(*args))
    monkeypatch.setattr(CaptureStore, "add_grads", lambda *args: taken.add(args[1]) or add_grads(*args))
    model = quantized_swin(settings)
    report = calibrate(model, IMAGES, settings)
    names = [block.block for block in report.blocks]
    wanted = weighed if isinstance(weighed, list) else names if weighed else []
    assert taken == set(wanted)
    assert len(passes) == (len(IMAGES) if wanted else 0)
    assert wanted == [name for name in names if settings.needs_gradients(name)]
    assert names == list(partition(model))


class Headed(nn.Module):
    """A model whose head runs on some images only."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.body(x)
        return (x, self.head(x)) if len(x) > 2 else (x,)


@pytest.mark.parametrize("sizes", [(5, 2), (2, 5), (2, 2)])
def test_images_on_which_nothing_that_is_weighed_has_a_say(sizes):
    search = dict(metric="module", rounds=1, grids=short_grids(3), objective=dict(type="mse"))
    search["objectives"] = dict(heads=dict(pattern="head", type="hessian"))
    settings = recipe("minmax", search=search, on_unseen="float", scope="detector")
    torch.manual_seed(0)
    model = Headed()
    quantize_model(model, settings.policy)
    report = calibrate(model, [torch.randn(size, 4) for size in sizes], settings)
    assert [block.block for block in report.blocks] == ["body", "head"][: 1 + (5 in sizes)]


def test_a_block_that_runs_less_often_for_gradients_is_named(monkeypatch):
    monkeypatch.setattr(FeatureTask, "student", lambda self, model, x, context: [model.body(x)] * 2)
    monkeypatch.setattr(FeatureTask, "loss", lambda self, student, teacher, context: student[0].square().sum())
    settings = recipe("apq", search=dict(rounds=1, grids=short_grids(3)), scope="detector")
    model = Headed()
    quantize_model(model, settings.policy)
    with pytest.raises(CalibrationError, match=r"block 'head' ran 1 times in the float pass of image 0, but 0 times"):
        calibrate(model, [torch.randn(5, 4)], settings)


class Undisturbed(FeatureTask):
    """A student that is the teacher: what back-propagating a model against itself amounts to."""

    def student(self, model, sample, context):
        for quantizer in quantizers_of(model):
            quantizer.__dict__["forward"] = lambda x: x
        return model(sample)


class Constant(FeatureTask):
    """A loss that does not depend on most of the model."""

    def loss(self, student, teacher, context):
        return super().loss(student, teacher, context) * 0


class NotANumber(FeatureTask):
    def loss(self, student, teacher, context):
        return super().loss(student, teacher, context) * float("nan")


@pytest.mark.parametrize(
    ("task", "message"),
    [(Undisturbed(), "undisturbed point"), (Constant(), "zero at the output of block"), (NotANumber(), "not finite")],
)
def test_a_useless_gradient_is_refused(task, message):
    settings = recipe("apq", search=dict(grids=short_grids(4), rounds=2))
    with pytest.raises(CalibrationError, match=message):
        calibrate(quantized_swin(settings), IMAGES, settings, task)
