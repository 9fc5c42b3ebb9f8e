"""Calibrations that are broken off, and inputs that are unusual."""

import copy
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
from helpers import build_swin, recipe, short_grids
from torch import Tensor, nn

from apq_mmdet.calibration import CalibrationTask, FeatureTask, calibrate
from apq_mmdet.calibration.blocks import BLOCK_CLASSES, partition
from apq_mmdet.errors import BadInputError, CalibrationError, UncalibratedError
from apq_mmdet.layers import packed_state_dict, quantize_model, quantizers_of

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


def calibrated(model, name, inputs, **settings):
    """The model after a calibration with few candidates, and the report."""
    settings = recipe(name, search=dict(grids=short_grids(3), rounds=1), **settings)
    quantize_model(model, settings.policy)
    return model, calibrate(model, inputs, settings)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_weights_that_a_calibration_changed_are_not_taken_for_float(error, monkeypatch):
    def fail(*_):
        raise error

    if error:
        monkeypatch.setattr("apq_mmdet.calibration.calibrator.fit_output_compensation", fail)
    model, settings = nn.Sequential(nn.Linear(4, 4)), recipe("erq", search=dict(grids=short_grids(2)))
    quantize_model(model, settings.policy)
    with pytest.raises(error) if error else nullcontext():
        calibrate(model, [torch.randn(9, 4)], settings)
    with pytest.raises(BadInputError, match="has changed its weights: build the model"):
        calibrate(model, [torch.randn(9, 4)], settings)


@pytest.mark.parametrize(
    ("where", "refused"),
    [
        ("transforms.QueryKeyRescaling.divide", True),  # its norm has been divided already
        ("calibrator.capture_gradients", False),
        ("calibrator.search_block", False),
    ],
)
def test_a_half_equalized_model_is_not_calibrated_again(where, refused, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    settings = recipe("apq", search=dict(grids=short_grids(2), rounds=1), equalize=1.0)
    model = build_swin(depth=1)
    quantize_model(model, settings.policy)
    with monkeypatch.context() as patch:
        patch.setattr(f"apq_mmdet.calibration.{where}", fail)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, IMAGES[:1], settings)
    with pytest.raises(BadInputError, match="has changed its weights") if refused else nullcontext():
        calibrate(model, IMAGES[:1], settings)


class Broken(FeatureTask):
    """Is broken off at the gradients."""

    def loss(self, student, teacher, context):
        raise KeyboardInterrupt


def test_training_mode_and_gradients_are_restored_where_it_is_broken_off():
    model, settings = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), recipe("apq", search=dict(grids=short_grids(2)))
    quantize_model(model, settings.policy)
    model[0].bias.requires_grad_(False)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, [torch.randn(9, 4)], settings, Broken())
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["0.bias"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_of_half_precision_are_refused(dtype):
    with pytest.raises(BadInputError, match=rf"layer '0' has weights of {dtype}: calibrate in float32"):
        calibrated(nn.Sequential(nn.Linear(4, 4)).to(dtype), "minmax", [torch.randn(9, 4).to(dtype)])
    model, settings = nn.Sequential(nn.Linear(4, 4)), recipe("minmax")
    quantize_model(model, settings.policy)
    with pytest.raises(BadInputError, match=rf"layer '0' has weights of {dtype}: calibrate in float32"):
        calibrate(model.to(dtype), [torch.randn(9, 4).to(dtype)], settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_half_precision_is_left_as_it_is(dtype):
    model, settings = nn.Sequential(nn.Linear(4, 4)).to(dtype), recipe("minmax")
    with pytest.raises(BadInputError, match=r"calibrate in float32 \(model\.float\(\)\)"):
        quantize_model(model, settings.policy)
    quantize_model(model.float(), settings.policy)  # as the message says


def test_a_quantized_checkpoint_has_no_float_weights_to_calibrate():
    settings, images = recipe("minmax"), [torch.randn(9, 4)]
    model = nn.Sequential(nn.Linear(4, 4))
    floats = copy.deepcopy(model.state_dict())
    quantize_model(model, settings.policy)
    calibrate(model, images, settings)
    model.load_state_dict(packed_state_dict(model))
    with pytest.raises(BadInputError, match="of the quantized checkpoint that it has loaded"):
        calibrate(model, images, settings)
    model.load_state_dict(floats)
    calibrate(model, images, settings)


class Outer(nn.Module):
    """A block whose layer the model uses again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_a_layer_of_two_blocks_is_refused(names, monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [*BLOCK_CLASSES, Outer])
    outer = Outer()
    modules = {"a": outer, "b": outer.inner}
    model = nn.Sequential(OrderedDict((name, modules[name]) for name in names))
    with pytest.raises(BadInputError, match=r"is used in block '[ab]' too.*leave it float"):
        calibrated(model, "apq", [torch.randn(9, 4)])


class InPlace(nn.Module):
    """A block that works on its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.layer = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.act(x))


class ByKeyword(nn.Module):
    """A model that gives its block what it is given, by name."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x=x)


def test_a_block_that_changes_its_input_is_refused(monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [*BLOCK_CLASSES, InPlace])
    with pytest.raises(CalibrationError, match=r"block '0' changes its input in place.*inplace=False"):
        calibrated(nn.Sequential(InPlace()), "apq", [torch.randn(9, 4)])
    with pytest.raises(CalibrationError, match=r"block 'block' changes its input in place.*inplace=False"):
        calibrated(ByKeyword(InPlace()), "apq", [torch.randn(9, 4)])
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))  # changes what a block gave
    calibrated(model, "apq", [torch.randn(9, 4)])


class WithIndex(nn.Module):
    """A block that returns whole numbers too, from a convolution without a batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return y, y.argmax(0)


class First(CalibrationTask):
    """By the first output alone."""

    def teacher(self, model, sample):
        return model(sample)[0], None

    def student(self, model, sample, context):
        return model(sample)[0]

    def loss(self, student, teacher, context):
        return (student - teacher).square().sum()


def test_a_block_may_return_whole_numbers_and_a_convolution_take_one_image(monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [*BLOCK_CLASSES, WithIndex])
    settings = recipe("erq", search=dict(grids=short_grids(2), rounds=1))
    model = nn.Sequential(WithIndex())
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(2, 9, 8) for _ in range(2)], settings, First())
    assert all(quantizer.calibrated for quantizer in quantizers_of(model))


@pytest.mark.parametrize("images", [1, 2])
def test_a_convolution_of_one_image_is_searched_as_a_batch_of_one(images):
    """Also where it gives as many channels as it takes."""
    objective = dict(metric="module", objective=dict(type="hessian"))
    settings = recipe("apq", search=dict(grids=short_grids(5), rounds=1, **objective))
    inputs, factors = [torch.randn(4, 9, 8) for _ in range(images)], []
    for samples in (inputs, [x[None] for x in inputs]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 4, 3))
        quantize_model(model, settings.policy)
        factors.append(calibrate(model, samples, settings).blocks[0].factors)
    assert factors[0] == factors[1]


class Resized(nn.Module):
    """A transposed convolution that is told its output's size, by place or by keyword."""

    def __init__(self, by_keyword: bool) -> None:
        super().__init__()
        self.conv, self.by_keyword = nn.ConvTranspose2d(2, 3, 2, stride=2), by_keyword

    def forward(self, x: Tensor) -> Tensor:
        size = [2 * side + 1 for side in x.shape[2:]]
        return self.conv(x, output_size=size) if self.by_keyword else self.conv(x, size)


@pytest.mark.parametrize("by_keyword", [True, False])
def test_transposed_convolutions_may_be_told_their_outputs_size(by_keyword):
    quantized = dict(up=dict(kind="ConvTranspose2d", weight={}, input={}))
    settings = recipe("ptq4vit", search=dict(grids=short_grids(3), rounds=1), overrides=quantized)
    model = Resized(by_keyword)
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(1, 2, 5, 4), torch.randn(1, 2, 6, 4)], settings)
    assert all(quantizer.calibrated for quantizer in quantizers_of(model))


def test_samples_of_several_images_can_be_sampled():
    model, settings = build_swin(), recipe("apq_fast", search=dict(grids=short_grids(2), shortlist=1, windows=1))
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(2, 3, 64, 90)], settings)
    assert all(quantizer.calibrated for quantizer in quantizers_of(model))


class Pyramid(nn.Module):
    """A head that runs on each level of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.head(scale * x) for scale in (1, 4, 2))


def test_the_widest_level_of_an_image_counts():
    observed = {}
    images = [torch.randn(5000, 3) for _ in range(3)]
    for name in ("minmax", "percentile", "erq"):
        model, _ = calibrated(Pyramid(), name, images)
        observed[name] = [float(end) for end in model.head.quantizers["input"].observed]
    for name in ("percentile", "erq"):
        for found, widest in zip(observed[name], observed["minmax"], strict=True):
            assert 0.55 < found / widest <= 1.0  # the mean of the levels, clipped as much, is 0.4


@pytest.mark.parametrize("name", ["erq", "apq_plus"])
def test_blocks_make_up_for_quantized_inputs_that_come_by_keyword_too(monkeypatch, name):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            return self.linear(x)

    class Net(nn.Module):
        def __init__(self, keyword):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.keyword = Layer(), Layer(), keyword

        def forward(self, x):
            for layer in (self.first, self.second):
                x = (layer(x=x) if self.keyword else layer(x)).relu()
            return x

    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Layer])
    settings = recipe(name, w_bits=3, a_bits=3, search=dict(block_input="quantized", grids=short_grids(3)))
    inputs = [torch.randn(40, 16) for _ in range(2)]
    nets = [Net(keyword) for keyword in (False, True)]
    for net in nets:
        quantize_model(net, settings.policy)
        calibrate(net, inputs, settings)
    positional, by_keyword = (net.second.linear.weight for net in nets)
    assert torch.equal(positional, by_keyword)
