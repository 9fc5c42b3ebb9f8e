import contextlib
import itertools
from collections import OrderedDict

import pytest
import torch
from helpers import build_swin, recipe, short_grids
from torch import nn

from apq_mmdet.calibration import FeatureTask, calibrate, importance
from apq_mmdet.calibration.blocks import partition, watch_blocks
from apq_mmdet.calibration.importance import (
    GRADIENT_SCALE,
    PERTURBATION,
    _of_mean_one,
    capture_gradients,
    feature_loss,
)
from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers import float_only, quantize_model, quantizers_of

CURVATURE = torch.tensor([0.0, 0.5, 1.0, 4.0])


class Bowl(FeatureTask):
    """``sum h (s - t)^2 / 2``, whose gradient at a student t + d is h d."""

    def loss(self, student, teacher, context):
        return (CURVATURE * (student - teacher).square()).sum() / 2


class Slope(FeatureTask):
    """A loss whose gradient is the same everywhere: no perturbation changes it."""

    def loss(self, student, teacher, context):
        return student.sum()


class Cliff(FeatureTask):
    """A finite loss with an infinite gradient."""

    def loss(self, student, teacher, context):
        return (student - student.detach()).abs().sqrt().sum()


def importance_of(model, task, images, kind="perturbation"):
    """The importance at every block's output by (block, image)."""
    blocks = partition(model)
    for quantizer in quantizers_of(model):
        quantizer.observer.load([torch.tensor([[-1.0], [1.0]])])
        quantizer.set_range_factor(1.0)
    with CaptureStore(None, 2**20) as store, torch.no_grad():
        for image, x in enumerate(images):

            def see(name, args, kwargs, output, image=image):
                store.add_call(name, image, args, kwargs, output)

            with float_only(model), watch_blocks(blocks, see):
                store.put(("teacher", image), task.teacher(model, x))
        capture_gradients(model, blocks, images, task, store, kind)
        return {(name, call.image): call.grads[0].clone() for name in blocks for call in store.take_calls(name)}


def quantized(*layers):
    model = nn.Sequential(*layers)
    quantize_model(model, Recipe.from_dict(dict(w_bits=4, a_bits=4)).policy)
    return model.eval()


def test_perturbation_of_a_quadratic_loss():
    """With one block, g(+e) - g(-e) = 2 h e, and |e| is the same everywhere: what is left of mean 1 is h."""
    model, images = quantized(nn.Linear(3, 4)), [torch.randn(5, 3), torch.randn(2, 3)]
    found = importance_of(model, Bowl(), images)
    for image, x in enumerate(images):
        assert torch.allclose(found["0", image], (CURVATURE / CURVATURE.mean()).expand(len(x), 4), rtol=1e-4)


def test_an_image_without_importance():
    """It stays at zero, where a mean of 1 is out of reach."""
    assert [t.tolist() for t in _of_mean_one([torch.zeros(2), torch.zeros(1)])] == [[0.0, 0.0], [0.0]]
    assert [t.tolist() for t in _of_mean_one([torch.tensor([0.0, 6.0]), torch.ones(2)])] == [[0.0, 3.0], [0.5, 0.5]]


def test_perturbation_of_two_blocks_at_once(monkeypatch):
    """With y2 = y1 V' + c shifted by e1 and e2, the difference is 2 h (e1 V' + e2) and, behind V, that times V."""
    monkeypatch.setattr(importance, "_of_mean_one", lambda tensors: tensors)
    model, x = quantized(nn.Linear(3, 2), nn.Linear(2, 4)), torch.randn(6, 3)
    found = importance_of(model, Bowl(), [x])
    with torch.no_grad(), float_only(model):
        first = model[0](x)
        sizes = [PERTURBATION * y.std(correction=0) for y in (first, model[1](first))]
    v = model[1].weight.detach()  # [4, 2]
    for token in range(len(x)):  # whose signs are unknown: one of the 2^6 possible ones fits at both blocks
        fits = []
        for signs in itertools.product([-1.0, 1.0], repeat=6):
            e1, e2 = sizes[0] * torch.tensor(signs[:2]), sizes[1] * torch.tensor(signs[2:])
            change = 2 * CURVATURE * (v @ e1 + e2) * GRADIENT_SCALE
            pairs = [(change, found["1", 0][token]), (change @ v, found["0", 0][token])]
            fits.append(all(torch.allclose(want.abs(), got, rtol=1e-3, atol=1.0) for want, got in pairs))
        assert any(fits)


def test_the_gradient_at_the_quantized_model_is_autograds():
    model, x = quantized(nn.Linear(3, 2), nn.Linear(2, 4)), torch.randn(6, 3)
    found = importance_of(model, Bowl(), [x], "disturbed")
    with torch.no_grad(), float_only(model):
        teacher = model(x)
    first = model[0](x).detach().requires_grad_()
    second = model[1](first)
    want = torch.autograd.grad(Bowl().loss(second, teacher, None), [first, second])
    for block, grad in zip("01", want, strict=True):
        assert bool(grad.any())
        assert torch.allclose(found[block, 0], GRADIENT_SCALE * grad, rtol=1e-5)


def test_it_does_not_depend_on_the_quantizers():
    found = []
    for bits in (2, 8):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4))
        quantize_model(model, Recipe.from_dict(dict(w_bits=bits, a_bits=bits)).policy)
        found.append(importance_of(model, Bowl(), [torch.ones(1, 3)])["0", 0])
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("task", "message"),
    [(Slope(), r"is zero at the output of block '0'.*z_unused.pattern='re:0\(\\\.\.\*\)\?' "), (Cliff(), "not finite")],
)
def test_a_useless_importance_is_refused(task, message):
    with pytest.raises(CalibrationError, match=message):
        importance_of(quantized(nn.Linear(3, 4)), task, [torch.randn(5, 3)])


def test_a_block_that_was_left_float_may_have_no_gradient():
    """What is not quantized has no errors to weigh."""
    for overrides in ({}, dict(mine=dict(pattern="0", float=True))):
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 4))
        nn.init.zeros_(model[1].weight)
        quantize_model(model, Recipe.from_dict(dict(w_bits=4, a_bits=4, overrides=overrides)).policy)
        with contextlib.nullcontext() if overrides else pytest.raises(CalibrationError, match="is zero at the output"):
            importance_of(model.eval(), Bowl(), [torch.randn(5, 3)])


@pytest.mark.parametrize(("error", "refused"), [(1e-4, False), (1e-5, False), (1e-7, True)])
def test_how_much_disturbance_is_enough(error, refused):
    """Eight bits disturb by a thousandth, float32 rounds off a ten-millionth."""
    teacher = torch.ones(10)
    with pytest.raises(CalibrationError, match="undisturbed") if refused else contextlib.nullcontext():
        importance._check_disturbed([teacher * (1 + error)], [teacher], torch.tensor(1.0))


def test_a_recipe_chooses_it():
    """The block with two kinds of importance ends with other ranges."""
    factors = {}
    for kind in ("disturbed", "perturbation"):
        settings = recipe("apq", importance=kind, search=dict(grids=short_grids(16), rounds=1))
        torch.manual_seed(3)
        model = build_swin(depth=1)
        quantize_model(model, settings.policy)
        report = calibrate(model, [torch.randn(1, 3, 57, 41) for _ in range(2)], settings)
        factors[kind] = [block.factors for block in report.blocks]
    assert factors["disturbed"] != factors["perturbation"]


def test_validation():
    assert Recipe.from_dict({}).importance == "disturbed"
    with pytest.raises(BadInputError, match=r"quant\.importance: unknown value 'perturbed'; .* 'perturbation'"):
        Recipe.from_dict(dict(importance="perturbed", search={}))
    with pytest.raises(BadInputError, match=r"quant\.importance works on searched blocks"):
        Recipe.from_dict(dict(importance="perturbation"))


def test_the_loss_of_features_is_relative_to_the_power_of_each():
    student = [torch.tensor([1.0, 3.0]), {"neck": torch.tensor([40.0])}]
    teacher = [torch.tensor([1.0, 1.0]), {"neck": torch.tensor([20.0])}]
    assert float(feature_loss(student, teacher)) == pytest.approx(2 / 1 + 400 / 400)


def test_outputs_that_are_whole_numbers_or_truths_do_not_count():
    student, teacher = torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])
    others = [(torch.tensor([7]), torch.tensor([9])), (torch.tensor([True]), torch.tensor([False]))]
    outputs = [(student, teacher), *others]
    assert float(feature_loss([s for s, _ in outputs], [t for _, t in outputs])) == pytest.approx(2)
    with pytest.raises(CalibrationError, match="no output of floating-point numbers"):
        feature_loss([s for s, _ in others], [t for _, t in others])


class Index(nn.Module):
    """A block that gives whole numbers alone."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        return self.layer(x).argmax(-1)


class WithIndex(nn.Module):
    """A block that gives the place of the largest number too, and which are positive."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, x):
        y = self.layer(x)
        return y, y.argmax(-1), y > 0


class WithoutIndex(WithIndex):
    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("apq", {}),
        ("apq", dict(search=dict(objective=dict(type="mse")))),
        ("aphq", dict(reconstruction=dict(weighting="absolute", iterations=5))),
        ("qdrop", dict(reconstruction=dict(weighting="none", iterations=5))),
        ("apq_plus", {}),
    ],
)
def test_a_block_may_give_whole_numbers_too(name, changes, monkeypatch):
    """They change nothing of what a model without them becomes."""
    search = dict(grids=short_grids(13), rounds=1, **changes.get("search", {}))
    settings = recipe(name, **{**changes, "search": search})
    found, weights = [], []
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [WithIndex])
    for model in (WithIndex(), WithoutIndex()):
        with torch.no_grad():
            model.layer.weight.copy_(torch.linspace(-2, 3, 12).view(4, 3))
            model.layer.bias.copy_(torch.linspace(1, -1, 4))
        quantize_model(model, settings.policy)
        report = calibrate(model, [torch.linspace(-3, 5, 60).view(20, 3)], settings)
        found.append([(block.factors, block.reconstructions) for block in report.blocks])
        weights.append(model.layer.weight)
    assert found[0] == found[1]
    assert torch.equal(*weights)


def test_a_block_without_a_floating_point_output_is_named(monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Index])
    model = nn.Sequential(OrderedDict(index=Index(), last=nn.Embedding(4, 2)))
    settings = recipe("apq", search=dict(grids=short_grids(3), objective=dict(type="mse")))
    quantize_model(model, settings.policy)
    with pytest.raises(CalibrationError, match="block 'index' gives no floating-point numbers"):
        calibrate(model, [torch.randn(5, 3)], settings)


def test_autocast_changes_nothing():
    """It is the calibration's business which products are computed with how many bits."""
    settings, weights = recipe("apq_plus", search=dict(grids=short_grids(13))), []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        quantize_model(model, settings.policy)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            calibrate(model, [torch.randn(20, 3)], settings)
        weights.append(torch.cat([model[2].weight.flatten(), model[2].quantizers["input"].scale]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(("name", "needs"), [("apq", True), ("brecq", True), ("minmax", False), ("apq_plus", False)])
def test_inference_mode_is_refused_where_gradients_are_needed(name, needs):
    model, settings = nn.Sequential(nn.Linear(3, 4)), recipe(name)
    quantize_model(model, settings.policy)
    expected = pytest.raises(CalibrationError, match="inference_mode") if needs else contextlib.nullcontext()
    with torch.inference_mode(), expected:
        calibrate(model, [torch.randn(8, 3)], settings)


def test_a_block_that_only_another_process_saw_in_float_is_named():
    model, x = quantized(nn.Linear(3, 2), nn.Linear(2, 4)), torch.randn(6, 3)
    for quantizer in quantizers_of(model):
        quantizer.set_parameters(torch.ones(1), torch.zeros(1, dtype=torch.int32))
    with CaptureStore(None, 2**20) as store, torch.no_grad():
        store.put(("teacher", 0), (torch.zeros(6, 4), None))
        with pytest.raises(CalibrationError, match="block '0' ran 0 times in the float pass of image 0, but 1 times"):
            capture_gradients(model, partition(model), [x], Bowl(), store)
