"""MLPs with a ReLU for their GELU: what becomes of them, and how they are refitted."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import build_swin, recipe, short_grids
from mmcv.cnn.bricks.transformer import FFN
from timm.layers import Mlp as TimmMlp
from torch import nn

from apq_mmdet.calibration import calibrate, mlp_refit
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model
from apq_mmdet.layers.mlp_refit import ReplacedActivation, mlps_of, original_function, replace_activations
from apq_mmdet.models.timm_import import import_timm

import_timm()


def refitting(**changes):
    search = dict(grids=short_grids(3), rounds=1)
    return recipe("aphq", reconstruction=None, mlp_refit=True, search=search, **changes)


def images(number=2):
    torch.manual_seed(1)
    return [torch.randn(1, 3, 57 - 8 * i, 41) for i in range(number)]


def swin(settings=None):
    torch.manual_seed(0)
    model = build_swin(depth=1)
    if settings is not None:
        quantize_model(model, settings.policy)
    return model


@pytest.fixture(scope="module")
def calibrated():
    settings = refitting()
    model = swin(settings)
    calibrate(model, images(), settings)
    return model


def ffn_tokens(model):
    """Inputs, hidden values and outputs of the only MLP on all images: [tokens, channels] each."""
    ffn, seen = model.stages[0].blocks[0].ffn, []
    hooks = [
        ffn.layers[0][0].register_forward_pre_hook(lambda _, args: seen.append(args[0])),
        ffn.layers[1].register_forward_hook(lambda _, args, output: seen.extend((args[0], output))),
    ]
    with torch.no_grad():
        for x in images():
            model(x)
    for hook in hooks:
        hook.remove()
    return [torch.cat([t.flatten(0, -2) for t in seen[i::3]]) for i in range(3)]


def run(ffn, x, activation):
    first, second = ffn.layers[0][0], ffn.layers[1]
    return F.linear(activation(F.linear(x, first.weight, first.bias)), second.weight, second.bias)


def test_relu_stands_in_for_gelu_but_where_the_float_model_is_asked_for():
    model, plain = swin(refitting()), swin()
    x = images()[0]
    with torch.no_grad():
        with original_function(model):
            assert torch.allclose(model(x)[0], plain(x)[0], atol=1e-6)
        plain.stages[0].blocks[0].ffn.layers[0][1] = nn.ReLU()
        with float_only(model):
            assert torch.allclose(model(x)[0], plain(x)[0], atol=1e-6)


def test_the_refit_comes_near_what_the_mlp_gave(calibrated):
    torch.manual_seed(0)
    plain = swin()
    x, _, y = ffn_tokens(plain)

    def error(ffn):
        return float((run(ffn, x, F.relu) - y).square().mean())

    settings = refitting(equalize=0.0)  # which would divide these inputs
    model = swin(settings)
    calibrate(model, images(), settings)
    assert error(model.stages[0].blocks[0].ffn) < 0.2 * error(plain.stages[0].blocks[0].ffn)


def test_blocks_are_judged_by_what_the_model_gave_with_its_gelu(monkeypatch):
    seen, add = {}, CaptureStore.add_call

    def note(self, name, image, args, kwargs, output):
        seen[name, image] = output
        add(self, name, image, args, kwargs, output)

    monkeypatch.setattr(CaptureStore, "add_call", note)
    monkeypatch.setattr(mlp_refit, "STEPS", 2)
    settings, plain, wanted = refitting(), swin(), []
    plain.stages[0].blocks[0].register_forward_hook(lambda _, args, output: wanted.append(output))
    with torch.no_grad():
        for x in images():
            plain(x)
    calibrate(swin(settings), images(), settings)
    for image, output in enumerate(wanted):
        assert torch.allclose(seen["stages.0.blocks.0", image], output, atol=1e-6)


def test_hidden_values_are_clipped_at_the_mean_quantile_of_the_positive_ones(monkeypatch):
    found = []
    monkeypatch.setattr(mlp_refit, "_fit", lambda name, mlp, tokens, largest, seed: found.append(largest))
    settings, plain, wanted = refitting(), swin(), []

    def note(_, args, output):
        positive = args[0][args[0] > 0].sort().values
        wanted.append(float(positive[math.ceil(0.999 * len(positive)) - 1]))

    plain.stages[0].blocks[0].ffn.layers[1].register_forward_hook(note)
    with torch.no_grad():
        for x in images():
            plain(x)
    calibrate(swin(settings), images(), settings)
    assert found == [pytest.approx(sum(wanted) / 2, rel=1e-5)]


def test_clipped_hidden_values_count_twice(monkeypatch):
    """A wide value that only one direction of hidden values has is given up where it is always clipped."""
    torch.manual_seed(0)
    x = torch.rand(200, 1) + 1
    mlp = TimmMlp(1, 1, 1, bias=False)
    with torch.no_grad():
        mlp.fc1.weight.fill_(1.0), mlp.fc2.weight.fill_(1.0)
    (_, found), *_ = mlps_of(mlp)
    monkeypatch.setattr(mlp_refit, "STEPS", 300)
    y = F.relu(x)

    class Tokens:
        def __iter__(self):
            padding = torch.zeros(len(x), dtype=torch.int64)
            yield mlp_refit.UnitCall((x,), {}, y, None, padding, 0, y.numel(), separable=True)

        def __getitem__(self, index):
            return next(iter(self))

    with torch.no_grad():
        mlp_refit._fit("mlp", found, Tokens(), largest=1.0, seed=0)
        hidden = F.relu(mlp.fc1(x))

        def loss(second):
            errors = [h * second - y for h in (hidden, hidden.clamp(max=1.0))]
            return float(errors[0].square().mean() + 2 * errors[1].square().mean())

        learned = float(mlp.fc2.weight)
        assert learned > 1.02  # as clipped values are too small
        assert loss(learned) < loss(1.0)


def test_ranges_are_those_of_the_refitted_mlp(calibrated):
    first, second = calibrated.stages[0].blocks[0].ffn.layers[0][0], calibrated.stages[0].blocks[0].ffn.layers[1]
    with torch.no_grad(), float_only(calibrated):
        _, hidden, _ = ffn_tokens(calibrated)
    low, high = second.quantizers["input"].observed
    assert float(low) == 0
    # observed on the float inputs of the block, which here are those that run in float
    assert float(high) == pytest.approx(float(hidden.max()), rel=0.05)
    for layer in (first, second):
        low, high = layer.quantizers["weight"].observed
        assert torch.equal(torch.stack([low.min(), high.max()]), torch.stack(layer.weight.aminmax()))


def test_a_checkpoint_gives_the_same_model(calibrated):
    other = swin(refitting())
    other.load_state_dict(packed_state_dict(calibrated))
    with torch.no_grad():
        assert torch.equal(other(images()[0])[0], calibrated(images()[0])[0])


def test_a_float_checkpoint_loads_strictly_and_a_second_calibration_needs_it(calibrated):
    with pytest.raises(BadInputError, match="has changed its weights"):
        calibrate(calibrated, images(), refitting())
    fresh = swin(refitting())
    fresh.load_state_dict(swin().state_dict(), strict=True)


def test_an_mlp_that_never_runs_keeps_its_weights(monkeypatch):
    settings = refitting(on_unseen="float")
    model = swin(settings)
    block = model.stages[0].blocks[0]
    block.ffn.forward = lambda x, identity=None: x
    before = block.ffn.layers[1].weight.clone()
    calibrate(model, images(), settings)
    assert torch.equal(before, block.ffn.layers[1].weight)


def test_which_mlps_are_known():
    class Other(FFN):
        def forward(self, x, identity=None):
            return x

    known = [FFN(8, 16, act_cfg=dict(type="GELU")), TimmMlp(8, 16)]
    unknown = [Other(8, 16), FFN(8, 16, num_fcs=3), TimmMlp(8, 16, use_conv=True)]
    unknown.append(TimmMlp(8, 16, norm_layer=nn.LayerNorm))
    for mlp in known:
        (_, found), *_ = mlps_of(mlp)
        x = torch.randn(5, 8)
        activation = getattr(found.holder, found.activation)
        want = x + found.second(activation(found.first(x))) if isinstance(mlp, FFN) else mlp(x)
        assert torch.equal(mlp(x), want)
    assert not any(list(mlps_of(mlp)) for mlp in unknown)


def test_other_activations_stay():
    model = nn.ModuleList([FFN(8, 16, act_cfg=dict(type="ReLU")), FFN(8, 16, act_cfg=dict(type="GELU"))])
    replace_activations(model)
    assert [isinstance(ffn.layers[0][1], ReplacedActivation) for ffn in model] == [False, True]


def test_bad_input_is_refused():
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit: expected True or False, got 1"):
        recipe("aphq", mlp_refit=1)
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit works on searched blocks"):
        recipe("minmax", mlp_refit=True)
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit needs whole blocks.*windows is 2, not 0"):
        recipe("apq_fast", mlp_refit=True)
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit: the model has no MLP with a GELU.*FFN"):
        quantize_model(nn.Sequential(nn.Linear(3, 3)), refitting().policy)


def test_nan_is_refused(monkeypatch):
    monkeypatch.setattr(mlp_refit, "STEPS", 1)
    monkeypatch.setattr(mlp_refit, "CLIPPED_WEIGHT", float("nan"))
    settings = refitting()
    with pytest.raises(CalibrationError, match=r"refit of MLP 'ffn'.*NaN"):
        calibrate(swin(settings), images(), settings)
