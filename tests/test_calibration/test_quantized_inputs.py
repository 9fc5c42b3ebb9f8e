"""What blocks are given behind quantized ones, where a block runs once, several times or at another number."""

import pytest
import torch
from helpers import recipe, short_grids
from torch import nn

from apq_mmdet.calibration import FeatureTask, calibrate, calibrator
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers import float_only, quantize_model


def behind_quantized(name, **search):
    return recipe(name, scope="detector", search=dict(grids=short_grids(2), block_input="quantized", **search))


class Levels(nn.Module):
    """A model whose head runs twice on an image."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.last = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        y = self.stem(x)
        return self.last(self.head(y) - self.head(3 * y).tanh())


def test_each_call_of_a_block_is_given_what_the_quantized_model_has_there(monkeypatch):
    model, settings = Levels(), behind_quantized("apq", rounds=1)
    images = [torch.randn(9, 4) for _ in range(2)]
    given, seen, replace_input = {}, {}, CaptureStore.replace_input

    def note(self, block, image, index, args, kwargs):
        given[block, image, index] = args[0].clone()
        replace_input(self, block, image, index, args, kwargs)

    monkeypatch.setattr(CaptureStore, "replace_input", note)
    quantize_model(model, settings.policy)
    calibrate(model, images, settings)
    for name in ("stem", "head", "last"):
        getattr(model, name).register_forward_pre_hook(lambda _, args, n=name: seen.setdefault(n, []).append(args[0]))
    with torch.no_grad():
        for x in images:
            model(x)
    assert {name: len(calls) for name, calls in seen.items()} == {"stem": 2, "head": 4, "last": 2}
    assert len(given) == 2 + 4 + 2
    for (name, image, index), x in given.items():
        assert torch.equal(x, seen[name][image * len(seen[name]) // 2 + index]), (name, image, index)


def test_the_float_inputs_are_kept_besides(monkeypatch):
    settings = behind_quantized("erq", rounds=1)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), torch.randn(30, 4)
    quantize_model(model, settings.policy)
    with torch.no_grad(), float_only(model):
        want = {model[0]: x, model[2]: model[1](model[0](x))}
    found, compensate = [], calibrator.compensate

    def look(module, calls, config):
        (call,) = calls
        assert torch.equal(call.of_float.args[0], want[module])
        found.append(torch.equal(call.args[0], want[module]))
        return compensate(module, calls, config)

    monkeypatch.setattr(calibrator, "compensate", look)
    calibrate(model, [x], settings)
    assert found == [True, False]  # nothing quantized comes before the first block


class Repeating(nn.Module):
    """A model that runs a block as often as it is told."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.last, self.times = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), 2

    def forward(self, x):
        y = self.stem(x)
        return self.last(sum((self.block((i + 1) * y) for i in range(self.times)), y))


class OtherTimes(FeatureTask):
    """Runs the block as often as this in everything but the float pass."""

    def __init__(self, times):
        self.times = times

    def student(self, model, sample, context):
        model.times = self.times
        return model(sample)


@pytest.mark.parametrize(("times", "told"), [(1, "1 times"), (0, "0 times"), (3, "more times"), (2, None)])
def test_a_block_that_runs_at_another_number_behind_quantized_ones_is_refused(times, told):
    settings = behind_quantized("repq", metric="module", objective=dict(type="mse"))
    model = Repeating()
    quantize_model(model, settings.policy)
    images = [torch.randn(9, 4) for _ in range(2)]
    if told is None:
        assert len(calibrate(model, images, settings, OtherTimes(times)).blocks) == 3
        return
    message = f"block 'block' ran 2 times in the float pass of image 0, but {told} behind quantized blocks"
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, images, settings, OtherTimes(times))


class Optional(nn.Module):
    """A model whose first layer runs on wide inputs alone."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.down(self.up(x).relu() if len(x) > 4 else x)


@pytest.mark.parametrize("wide", [0, 1])
def test_a_block_that_the_first_image_skips_is_finished_before_what_it_is_the_input_of(wide, monkeypatch):
    given, replace_input = {}, CaptureStore.replace_input

    def note(self, block, image, index, args, kwargs):
        given[block, image] = args[0].clone()
        replace_input(self, block, image, index, args, kwargs)

    monkeypatch.setattr(CaptureStore, "replace_input", note)
    settings = behind_quantized("erq")
    model, images = Optional(), [torch.randn(3, 4), torch.randn(3, 4)]
    images[wide] = torch.randn(30, 4)
    quantize_model(model, settings.policy)
    assert [block.block for block in calibrate(model, images, settings).blocks] == ["up", "down"]
    with torch.no_grad():
        assert torch.equal(given["down", wide], model.up(images[wide]).relu())
    assert torch.equal(given["down", 1 - wide], images[1 - wide])
