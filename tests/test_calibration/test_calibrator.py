import copy
from collections import Counter

import pytest
import torch
from helpers import build_swin, recipe, short_grids
from mmdet.registry import MODELS
from torch import nn

from apq_mmdet.calibration import FeatureTask, calibrate, calibrator
from apq_mmdet.calibration.blocks import partition
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model, quantized_layers, quantizers_of
from apq_mmdet.models.stress import stress
from apq_mmdet.quantizers.observers import MinMaxObserver, PercentileObserver

IMAGES = [torch.randn(1, 3, 57, 41), torch.randn(1, 3, 33, 64), torch.randn(1, 3, 57, 41)]


def quantized_swin(settings):
    torch.manual_seed(3)
    model = build_swin()
    quantize_model(model, settings.policy)
    return model


class States(dict):
    """Block states in memory that can refuse to go on, as a killed process would."""

    def __init__(self, die_after=None):
        super().__init__()
        self.die_after = die_after

    def load(self, block):
        return copy.deepcopy(self.get(block))

    def save(self, block, state):
        if self.die_after == len(self):
            raise KeyboardInterrupt
        self[block] = copy.deepcopy(state)


def fast(**settings):
    return recipe("apq", search=dict(grids=short_grids(4), rounds=2), **settings)


def killed_and_resumed(settings):
    """Model and report of a calibration that died when it had kept a block, and again when it had kept two."""
    states = States()
    for states.die_after in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            calibrate(quantized_swin(settings), IMAGES, settings, states=states)
    states.die_after = None
    model = quantized_swin(settings)
    report = calibrate(model, IMAGES, settings, states=states)
    assert [block.resumed for block in report.blocks] == [i < 2 for i in range(len(report.blocks))]
    return model, report


RESUMED = {
    "apq": {},
    "apq on quantized inputs": dict(search=dict(block_input="quantized")),
    "qwt": {},  # output compensation
    "qdrop": dict(reconstruction=dict(weighting="none", iterations=3, batch=4, keep_float=0.5)),  # learned weights
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_calibration_gives_the_same_state(name):
    changes = {"search": {}, **RESUMED[name]}
    search = dict(grids=short_grids(4), rounds=2, **changes.pop("search"))
    settings = recipe(name.split()[0], search=search, **changes)
    whole = quantized_swin(settings)
    calibrate(whole, IMAGES, settings)
    a, b = packed_state_dict(whole), packed_state_dict(killed_and_resumed(settings)[0])
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_reports_tell_what_reconstructions_came_to():
    settings = fast(reconstruction=[dict(iterations=2, batch=2), dict(iterations=1, batch=2, rounding_lr=0)])
    whole = calibrate(quantized_swin(settings), IMAGES, settings)
    _, resumed = killed_and_resumed(settings)
    told = [block.reconstructions for block in whole.blocks]
    assert told == [block.reconstructions for block in resumed.blocks]
    assert {len(stages) for stages in told} == {2}
    for found in (found for stages in told for found in stages):
        assert found["kept"] is (found["after"] < found["before"])


def test_block_inputs_matter():
    results = []
    for block_input in ("float", "quantized"):
        settings = recipe("apq", search=dict(grids=short_grids(), rounds=1, block_input=block_input))
        model = quantized_swin(settings)
        results.append(calibrate(model, IMAGES, settings).blocks)
    first, second = results
    assert first[0].factors == second[0].factors  # nothing quantized comes before the first block
    assert [b.factors for b in first[1:]] != [b.factors for b in second[1:]]


def test_quantized_inputs_take_one_replay_in_total(monkeypatch):
    """Each block runs once per image for it: the same number of runs as with float inputs, and one more."""
    runs = {}
    for block_input in ("float", "quantized"):
        settings = recipe("apq", search=dict(grids=short_grids(1), rounds=1, block_input=block_input))
        model = quantized_swin(settings)
        count = runs.setdefault(block_input, Counter())
        for name, block in partition(model).items():
            block.register_forward_hook(lambda *_, name=name, count=count: count.update([name]))
        calibrate(model, IMAGES, settings)
    assert set(runs["float"].values()) == {2 * len(IMAGES)}  # the float and the disturbed pass; views do the rest
    extra = runs["quantized"] - runs["float"]
    # the replayed forward of a finished block is counted too, but runs nothing: it hands out what is stored
    assert list(extra.values()) == [len(IMAGES) * n for n in reversed(range(1, len(extra) + 1))]


def test_quantized_inputs_are_those_of_the_quantized_model():
    settings = recipe("apq", search=dict(grids=short_grids(2), rounds=1, block_input="quantized"))
    model, seen, given = quantized_swin(settings), {}, {}
    monkey = CaptureStore.replace_input

    def note(self, block, image, index, args, kwargs):
        given[block, image] = args[0].clone()
        monkey(self, block, image, index, args, kwargs)

    CaptureStore.replace_input = note
    try:
        calibrate(model, IMAGES, settings)
    finally:
        CaptureStore.replace_input = monkey
    for name, block in partition(model).items():
        block.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone()))
    with torch.no_grad():
        for x in IMAGES:
            model(x)
    assert len(given) == len(IMAGES) * len(seen)
    assert all(torch.equal(x, seen[name][image]) for (name, image), x in given.items())


def test_search_beats_min_max_on_its_own_loss():
    errors = {}
    for name in ("minmax", "apq"):
        settings = fast() if name == "apq" else recipe("minmax")
        model = quantized_swin(settings)
        task = FeatureTask()
        with torch.no_grad():
            want = build_reference(model)
            calibrate(model, IMAGES, settings)
            errors[name] = sum(float(task.loss(model(x), want(x), None)) for x in IMAGES)
    assert errors["apq"] < errors["minmax"]


def build_reference(model):
    float_model = copy.deepcopy(model)
    for quantizer in quantizers_of(float_model):
        quantizer.forward = lambda x: x
    return float_model


def test_a_grid_below_what_a_format_allows_is_refused():
    settings = recipe("apq", search=dict(grids=dict(MatMul=(0.5, 0.8, 4))))
    with pytest.raises(BadInputError, match=r"grids\.MatMul .* at least 0\.9.*attention"):
        calibrate(quantized_swin(settings), IMAGES, settings)


def test_checkpointed_blocks_can_be_searched():
    """Activation checkpointing (with_cp) is for training; autograd cannot take gradients inside it."""
    settings = fast()
    swin = MODELS.build(
        dict(
            type="apq_mmdet.SwinTransformer",
            quant=dict(w_bits=4, a_bits=4),
            embed_dims=8,
            depths=(2,),
            num_heads=(2,),
            strides=(4,),
            out_indices=(0,),
            with_cp=True,
        )
    )
    calibrate(swin, IMAGES, settings)
    assert not any(getattr(module, "with_cp", False) for module in swin.modules())


def test_minmax_captures_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("captured")

    monkeypatch.setattr("apq_mmdet.calibration.store.CaptureStore.add_call", refuse)
    calibrate(quantized_swin(recipe("minmax")), IMAGES, recipe("minmax"))
    with pytest.raises(AssertionError, match="captured"):
        calibrate(quantized_swin(fast()), IMAGES, fast())


def test_captures_go_where_the_caller_says_and_go_away(tmp_path, monkeypatch):
    seen = []
    original = CaptureStore.add_call

    def note(self, *args):
        original(self, *args)
        seen.extend(tmp_path.glob("apq_capture_*/*"))

    monkeypatch.setattr(CaptureStore, "add_call", note)
    calibrate(quantized_swin(fast()), IMAGES, fast(), capture_dir=tmp_path, memory_budget=0)
    assert seen
    assert not list(tmp_path.iterdir())


def test_no_samples():
    settings = recipe("minmax")
    with pytest.raises(CalibrationError, match="no calibration samples"):
        calibrate(quantized_swin(settings), [], settings)


def test_any_module_works():
    settings = fast()
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(inplace=True), nn.Flatten(2), nn.Linear(36, 5))
    quantize_model(model, settings.policy)
    report = calibrate(model, [torch.randn(1, 3, 8, 8) for _ in range(2)], settings)
    assert [block.block for block in report.blocks] == ["0", "3"]
    assert set(report.blocks[1].factors) == {"weight", "input"}


def test_training_mode_and_gradients_are_restored():
    settings = fast()
    model = quantized_swin(settings)
    model.train()
    calibrate(model, IMAGES[:1], settings)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


class InPlaceSkip(nn.Module):
    """What follows a block changes its output in place, and uses it again later."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        y = self.a(x)
        y += x
        return self.c(self.b(y) + y)


def test_quantized_inputs_with_outputs_modified_in_place():
    settings = recipe("apq", search=dict(grids=short_grids(4), block_input="quantized"))
    images, states = [torch.randn(5, 4) for _ in range(2)], []
    for budget in (0, 2**20):
        torch.manual_seed(0)
        model = InPlaceSkip()
        quantize_model(model, settings.policy)
        calibrate(model, images, settings, memory_budget=budget)
        states.append(packed_state_dict(model))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_nan_in_every_error_is_an_error_with_the_layers_name(monkeypatch):
    settings = recipe("apq", search=dict(grids=short_grids(20)))
    cost = "apq_mmdet.calibration.objectives.HessianObjective.cost"
    monkeypatch.setattr(cost, lambda self, e, g, t: e * float("nan"))
    with pytest.raises(CalibrationError, match=r"block 'patch_embed': projection.weight: the error of every candidate"):
        calibrate(quantized_swin(settings), IMAGES, settings)


def plus(**settings):
    return recipe("apq_plus", search=dict(grids=short_grids(4)), **settings)


@pytest.mark.parametrize("block_input", ["float", "quantized"])
def test_resumed_calibration_gives_the_same_state_where_weights_change(block_input):
    settings = recipe("apq_plus", search=dict(grids=short_grids(4), block_input=block_input))
    original, whole = quantized_swin(settings), quantized_swin(settings)
    calibrate(whole, IMAGES, settings)
    a, b, c = (model.state_dict() for model in (whole, killed_and_resumed(settings)[0], original))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(not torch.equal(a[key], c[key]) for key in a if key.endswith("ffn.layers.1.weight"))


def outputs_of(model):
    with torch.no_grad():
        return [output for x in IMAGES for output in model(x)]


def test_equalized_models_keep_their_float_function():
    settings = recipe("apq", search=dict(grids=short_grids(1), rounds=1), equalize=1.0)
    model = quantized_swin(settings)
    before = copy.deepcopy(model)
    calibrate(model, IMAGES, settings)
    pairs = zip(model.named_parameters(), before.parameters(), strict=True)
    assert all(not torch.equal(p, q) for (name, p), q in pairs if ".norm1." in name or ".norm2." in name)
    with float_only(model), float_only(before):
        pairs = zip(outputs_of(model), outputs_of(before), strict=True)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max())) for a, b in pairs)


def test_equalization_helps_uneven_channels():
    errors, whole_ranges = {}, dict.fromkeys(short_grids(), (1.0, 1.0, 1))
    for strength in (0.0, 1.0):
        settings = recipe("apq_plus", search=dict(grids=whole_ranges), equalize=strength, compensation=None)
        torch.manual_seed(3)
        model = build_swin()
        stress(model, lambda model=model: outputs_of(model))
        want = outputs_of(model)
        quantize_model(model, settings.policy)
        calibrate(model, IMAGES, settings)
        errors[strength] = sum(float((a - b).square().sum()) for a, b in zip(outputs_of(model), want, strict=True))
    assert errors[1.0] < 0.7 * errors[0.0]


@pytest.mark.parametrize("equalize", [0.0, 1.0])
def test_observers_are_for_activations_alone(equalize):
    settings = recipe("apq", search=dict(grids=short_grids(1), rounds=1), observer="percentile", equalize=equalize)
    model = quantized_swin(settings)
    calibrate(model, IMAGES, settings)
    for _, layer in quantized_layers(model):
        for role, quantizer in layer.quantizers.items():
            assert type(quantizer.observer) is (MinMaxObserver if role == "weight" else PercentileObserver)
            if role == "weight":
                low, high = quantizer.observed
                rows = layer.weight.view(quantizer.groups, -1)
                assert torch.equal(low, rows.amin(1))
                assert torch.equal(high, rows.amax(1))


def test_a_kept_state_of_another_model_is_refused():
    settings, states = fast(), States()
    calibrate(quantized_swin(settings), IMAGES[:1], settings, states=states)
    first = next(iter(states))
    states[first]["state"].popitem()
    with pytest.raises(CalibrationError, match="does not fit the model: start again without --resume"):
        calibrate(quantized_swin(settings), IMAGES[:1], settings, states=states)


def test_a_stage_draws_from_the_seed_of_the_run_plus_those_of_block_and_stage(monkeypatch):
    drawn = []

    def note(module, calls, stage, seed, told):
        drawn.append(seed)
        return {"before": 1.0, "after": 1.0, "kept": False}

    monkeypatch.setattr("apq_mmdet.calibration.calibrator.reconstruct", note)
    settings = fast(reconstruction=[dict(iterations=2, batch=2), dict(iterations=1, batch=2)])
    blocks = len(calibrate(quantized_swin(settings), IMAGES[:1], settings, seed=7).blocks)
    assert drawn == [7 + block + stage for block in range(blocks) for stage in range(2)]


def test_a_sample_of_tokens_is_what_a_block_is_calibrated_on(monkeypatch):
    settings = recipe(
        "apq_plus", w_bits=3, search=dict(grids=short_grids(2), tokens=60), reconstruction=dict(iterations=1)
    )
    sizes = {}
    search, weights, learn = calibrator.search_block, calibrator.compensate, calibrator.reconstruct
    for name, function in (("search_block", search), ("compensate", weights), ("reconstruct", learn)):

        def look(module, calls, *args, name=name, function=function):
            sizes.setdefault(name, []).append([len(call.targets) for call in calls])
            return function(module, calls, *args)

        monkeypatch.setattr(calibrator, name, look)
    calibrate(quantized_swin(settings), IMAGES, settings)
    assert sizes["search_block"] == sizes["compensate"] == sizes["reconstruct"]
    embedding, first, *_ = sizes["search_block"]
    assert embedding == [60] * len(IMAGES)  # of 165, 144 and 165 patches
    assert first == [1] * len(IMAGES)  # of 6 windows of 49 tokens


def test_the_seed_chooses_the_windows_of_a_sample():
    image, factors = torch.randn(1, 3, 90, 90), []
    settings = recipe("apq_fast", search=dict(grids=short_grids(12), rounds=1, windows=1))
    for seed in (0, 0, 1):
        report = calibrate(quantized_swin(settings), [image], settings, seed=seed)
        factors.append([block.factors for block in report.blocks])
    assert factors[0] == factors[1] != factors[2]


def test_what_the_first_process_has_kept_counts(monkeypatch):
    settings, states, found = fast(), States(), []
    first = iter("01")

    def gather(value):
        return [value] if value is not None else [states.load(next(first)), None]

    for kept in (states, States()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        quantize_model(model, settings.policy)
        report = calibrate(model, [torch.randn(9, 4)], settings, states=kept)
        found.append(([block.resumed for block in report.blocks], packed_state_dict(model)))
        monkeypatch.setattr(calibrator, "gather", gather)
    (resumed, whole), (resumed_again, again) = found
    assert (resumed, resumed_again) == ([False] * 2, [True] * 2)
    assert all(torch.equal(whole[key], again[key]) for key in whole)
