"""MLPs with a ReLU for their GELU: what becomes of them, and how they are refitted."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import as_calls, build_swin, recipe, short_grids
from mmcv.cnn.bricks.transformer import FFN
from timm.layers import Mlp as TimmMlp
from torch import nn

from apq_mmdet.calibration import calibrate, calibrator, mlp_refit
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.calibration.units import UnitCall
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model
from apq_mmdet.layers.mlp_refit import (
    MLPS,
    Mlp,
    ReplaceableActivation,
    make_replaceable,
    refittable_mlps,
    replaceable_mlps,
)
from apq_mmdet.models.timm_import import import_timm

import_timm()


def refitting(**changes):
    search = dict(grids=short_grids(3), rounds=1, **changes.pop("search", {}))
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


def test_the_activation_is_a_gelu_until_calibration_replaces_it(calibrated):
    model, plain, x = swin(refitting()), swin(), images()[0]
    with torch.no_grad(), float_only(model):
        assert torch.allclose(model(x)[0], plain(x)[0], atol=1e-6)
    ((_, mlp, activation),) = replaceable_mlps(calibrated)
    values = torch.linspace(-3, 3, 50)
    assert torch.equal(activation(values), F.relu(values))
    assert getattr(mlp.holder, mlp.activation) is activation


def test_the_refit_comes_near_what_the_mlp_gave():
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
    mlp = TimmMlp(1, 1, 1, bias=False)
    with torch.no_grad():
        mlp.fc1.weight.fill_(1.0), mlp.fc2.weight.fill_(1.0)
    monkeypatch.setattr(mlp_refit, "STEPS", 1)
    losses, grad = [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda loss, *more: losses.append(float(loss)) or grad(loss, *more))
    x, padding = torch.full((9, 1), 1.5), torch.zeros(9, dtype=torch.int64)
    tokens = as_calls([UnitCall((x,), {}, x + 0.25, None, padding, 0, 9, separable=True)])
    with torch.no_grad():
        mlp_refit._fit("mlp", Mlp(mlp.fc1, mlp.fc2, mlp, "act"), tokens, largest=1.0, seed=0)
    # the output is 0.25 too small, and 0.75 where hidden values end at 1
    assert losses == [pytest.approx(0.25**2 + 2 * 0.75**2)]


class TwoMlps(nn.Module):
    """A block with two MLPs, of which the first writes over what the second gets, run several times in a call."""

    def __init__(self):
        super().__init__()
        self.first, self.second = TimmMlp(4, 8), TimmMlp(4, 8)
        self.runs = 1

    def forward(self, x):
        for _ in range(self.runs):
            y = self.first(x)
            y += x
            x = self.second(y)
            x += y
        return x


@pytest.mark.parametrize("runs", [1, 2])
def test_all_mlps_of_a_block_learn_what_they_gave_in_float(runs, monkeypatch):
    kept = {}
    monkeypatch.setattr(mlp_refit, "STEPS", 1)
    fit = mlp_refit._fit

    def note(name, mlp, tokens, largest, seed):
        kept[name] = [(call.args[0].clone(), call.targets.clone()) for call in tokens]
        fit(name, mlp, tokens, largest, seed)

    monkeypatch.setattr(mlp_refit, "_fit", note)
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [TwoMlps])
    torch.manual_seed(0)
    block = TwoMlps()
    block.runs = runs
    model, settings = nn.Sequential(block), refitting()
    plain, x = copy.deepcopy(block), torch.randn(5, 4)
    quantize_model(model, settings.policy)
    calibrate(model, [x], settings)
    wanted = {"first": [], "second": []}
    with torch.no_grad():
        for name in wanted:
            plain.get_submodule(name).register_forward_hook(
                lambda _, args, y, n=name: wanted[n].append((args[0].clone(), y.clone()))
            )
        plain(x)
    for name, pairs in wanted.items():
        for got, want in zip(kept[name], pairs, strict=True):
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))
            assert len(got[0]) == 5


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
    again = copy.deepcopy(calibrated)
    with pytest.raises(BadInputError, match="has changed its weights"):
        calibrate(again, images(), refitting())
    again.load_state_dict(swin().state_dict(), strict=True)
    ((*_, activation),) = replaceable_mlps(again)
    values = torch.linspace(-3, 3, 50)
    assert torch.equal(activation(values), F.gelu(values))
    calibrate(again, images(), refitting())
    assert same_state(again, calibrated)


def same_state(a, b):
    states = a.state_dict(), b.state_dict()
    return all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_calibration_that_goes_on_gives_the_same(calibrated):
    class Kept(dict):
        load = dict.get

        def save(self, block, finished):
            self[block] = finished

    kept = Kept()
    settings = refitting()
    calibrate(swin(settings), images(), settings, states=kept)
    for block in list(kept)[2:]:
        del kept[block]
    again = swin(settings)
    calibrate(again, images(), settings, states=kept)
    assert same_state(again, calibrated)


def test_an_mlp_that_never_runs_stays_as_it_is():
    settings = refitting(on_unseen="float")
    model = swin(settings)
    block = model.stages[0].blocks[0]
    forward, block.ffn.forward = block.ffn.forward, lambda x, identity=None: x
    calibrate(model, images(), settings)
    block.ffn.forward, x = forward, torch.randn(6, 8)
    with torch.no_grad():
        assert torch.allclose(block.ffn(x), swin().stages[0].blocks[0].ffn(x), atol=1e-6)
    # the config of what was saved leaves the MLP float, and has no place for a ReLU then
    assert isinstance(block.ffn.layers[0][1], nn.GELU)
    kept = dict(pattern="*ffn*", float=True)
    other = swin(recipe("aphq", overrides=dict(mine=kept)))
    other.load_state_dict(packed_state_dict(model))


def test_a_shared_layer_is_not_refitted_even_if_its_weight_stays_float():
    torch.manual_seed(0)
    model, settings = build_swin(), refitting(overrides=dict(mine=dict(pattern="*ffn*", weight=None)))
    first, second = model.stages[0].blocks
    second.ffn.layers[1].weight = first.ffn.layers[1].weight
    with pytest.raises(BadInputError, match=r"blocks\.0\.ffn\.layers\.1' and .* share one weight"):
        quantize_model(model, settings.policy)


def test_which_mlps_are_known():
    class Other(FFN):
        def forward(self, x, identity=None):
            return x

    known = [FFN(8, 16, act_cfg=dict(type="GELU")), TimmMlp(8, 16)]
    unknown = [Other(8, 16), FFN(8, 16, num_fcs=3), TimmMlp(8, 16, use_conv=True)]
    unknown.append(TimmMlp(8, 16, norm_layer=nn.LayerNorm))
    for mlp in known:
        found = MLPS.find(mlp)(mlp)
        x = torch.randn(5, 8)
        activation = getattr(found.holder, found.activation)
        want = x + found.second(activation(found.first(x))) if isinstance(mlp, FFN) else mlp(x)
        assert torch.equal(mlp(x), want)
    assert [MLPS.find(mlp)(mlp) for mlp in unknown] == [None] * 4


def test_other_activations_and_float_mlps_stay():
    model = nn.ModuleList([FFN(8, 16, act_cfg=dict(type=kind)) for kind in ("ReLU", "GELU", "GELU")])
    quantized = {layer for ffn in model[:2] for layer in ffn.modules()}
    make_replaceable(refittable_mlps(model, quantized))
    assert [isinstance(ffn.layers[0][1], ReplaceableActivation) for ffn in model] == [False, True, False]
    for half in (model[2].layers[0][0], model[2].layers[1]):  # what would refit the other layer to nothing
        with pytest.raises(BadInputError, match="no quantized MLP with a GELU"):
            refittable_mlps(model, {half})
    settings = refitting(overrides=dict(mine=dict(pattern="*ffn*", float=True)))
    with pytest.raises(BadInputError, match="no quantized MLP with a GELU"):
        swin(settings)


def test_bad_input_is_refused():
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit: expected True or False, got 1"):
        recipe("aphq", mlp_refit=1)
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit works on searched blocks"):
        recipe("minmax", mlp_refit=True)
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit needs whole blocks.*windows is 2, not 0"):
        recipe("apq_fast", mlp_refit=True)
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit: the model has no quantized MLP with a GELU.*FFN"):
        quantize_model(nn.Sequential(nn.Linear(3, 3)), refitting().policy)


def test_an_mlp_in_no_block_is_refused():
    model, settings = nn.Sequential(TimmMlp(4, 8)), refitting()  # whose layers are blocks of their own
    quantize_model(model, settings.policy)
    with pytest.raises(BadInputError, match=r"quant\.mlp_refit: 0 lie in no block"):
        calibrate(model, [torch.randn(5, 4)], settings)


@pytest.mark.parametrize("where", ["refit_mlps", "_take_observed_ranges"])
def test_a_refit_that_is_broken_off_has_changed_weights(where, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    settings = refitting(equalize=0.0)
    model = swin(settings)
    with monkeypatch.context() as patch:
        patch.setattr(calibrator, where, fail)
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, images(), settings)
    with pytest.raises(BadInputError, match="has changed its weights"):
        calibrate(model, images(), settings)


def test_tokens_are_drawn_by_the_calibrations_seed(monkeypatch):
    seeds = []
    monkeypatch.setattr(calibrator, "refit_mlps", lambda *args: seeds.append(args[-1]))
    settings = refitting()
    calibrate(swin(settings), images(), settings, seed=7)
    assert seeds == [7]


def test_an_mlp_without_a_positive_hidden_value_is_refitted_too():
    settings = refitting()
    model = swin(settings)
    with torch.no_grad():
        model.stages[0].blocks[0].ffn.layers[0][0].bias.fill_(-50)
    calibrate(model, images(), settings)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_operations_of_a_refit():
    model = swin(refitting())
    # forward and weight gradients; the second layer on clipped values too, and their gradients
    assert mlp_refit.refit_operations(model) == 2 * 1000 * 512 * (8 * 32 * 2 + 32 * 8 * 6)
    assert mlp_refit.refit_operations(swin()) == 0


def test_inference_mode_is_refused():
    settings = refitting(importance="disturbed", search=dict(objective=dict(type="mse")))
    with torch.inference_mode(), pytest.raises(CalibrationError, match="needs gradients"):
        calibrate(swin(settings), images(), settings)


def test_nan_is_refused(monkeypatch):
    monkeypatch.setattr(mlp_refit, "STEPS", 1)
    monkeypatch.setattr(mlp_refit, "CLIPPED_WEIGHT", float("nan"))
    settings = refitting()
    with pytest.raises(CalibrationError, match=r"block 'stages.0.blocks.0': refit of MLP 'ffn'.*NaN"):
        calibrate(swin(settings), images(), settings)
