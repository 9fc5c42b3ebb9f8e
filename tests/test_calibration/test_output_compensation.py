import copy

import numpy as np
import pytest
import torch
from helpers import build_swin, recipe
from mmdet.models.backbones.swin import SwinBlock
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import BlockCall, partition
from apq_mmdet.calibration.output_compensation import DAMPING, fit_output_compensation
from apq_mmdet.calibration.store import CaptureStore, TensorStore
from apq_mmdet.calibration.units import UnitCalls, to_units, unit_module
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model, quantizers_of
from apq_mmdet.layers.output_compensation import COMPENSATED
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode

IMAGES = [torch.randn(1, 3, 57, 41), torch.randn(1, 3, 33, 64)]
SIZES = [(13, 9), (7, 14)]  # of tokens; the first is padded to whole windows


class Tokens(nn.Module):
    """A block that maps tokens to tokens."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x)


def observe_all(block, inputs):
    with torch.no_grad(), quantizer_mode(quantizers_of(block), QuantizerMode.OBSERVE):
        for args in inputs:
            block(*args)
    for layer in block.modules():
        if "weight" in getattr(layer, "quantizers", ()):
            layer.quantizers["weight"].observe(layer.weight)
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)


def calls_of(block, inputs, outputs):
    calls = UnitCalls(TensorStore(memory=2**30), "block")
    for image, (args, output) in enumerate(zip(inputs, outputs, strict=True)):
        calls.add(to_units(block, BlockCall(args, {}, [output], [torch.ones_like(output)], image)))
    return unit_module(block), calls


def compensated_swin():
    swin = build_swin()
    quantize_model(swin, recipe("qwt").policy)
    return swin


def ridge(x, missing):
    """[tokens, C] each -> W [C, C], b [C]: least squares with the ridge as further equations, the bias by the means."""
    x, missing = x.double().numpy(), missing.double().numpy()
    ridge = np.sqrt(DAMPING * (x**2).sum(0).mean()) * np.eye(x.shape[1])
    equations = np.concatenate([x - x.mean(0), ridge])
    weight = np.linalg.lstsq(equations, np.concatenate([missing, 0 * ridge]), rcond=None)[0].T
    return weight, missing.mean(0) - weight @ x.mean(0)


def check_fit(block, weight, bias):
    assert np.allclose(block.output_compensation.weight.numpy(), weight, atol=1e-4)
    assert np.allclose(block.output_compensation.bias.numpy(), bias, atol=1e-4)
    assert np.abs(weight).max() > 0.01


@pytest.fixture
def tokens(monkeypatch):
    monkeypatch.setitem(COMPENSATED, Tokens, lambda block: 4)
    model = nn.Sequential(Tokens())
    quantize_model(model, recipe("qwt", w_bits=2, a_bits=2).policy)
    return model[0]


def test_whole_calls(tokens):
    inputs = [(torch.randn(1, n, 4) + 1,) for n in (40, 25)]
    observe_all(tokens, inputs)
    with torch.no_grad():
        outputs = [tokens(x) + x @ torch.randn(4, 4) + 3 for (x,) in inputs]
        missing = torch.cat([(y - tokens(x))[0] for y, (x,) in zip(outputs, inputs, strict=True)])
        module, calls = calls_of(tokens, inputs, outputs)
        tokens.output_compensation.weight.fill_(7.0)  # of an earlier fit
        fit_output_compensation(tokens, module, calls)
    check_fit(tokens, *ridge(torch.cat([x[0] for (x,) in inputs]), missing))


def test_windows_with_padding():
    """What fills a window up counts for nothing."""
    block = compensated_swin().get_submodule("stages.0.blocks.1")
    inputs = [(torch.randn(1, h * w, 8), (h, w)) for h, w in SIZES]
    observe_all(block, inputs)
    with torch.no_grad():
        quantized = [block(*args) for args in inputs]
        outputs = [y + args[0] @ torch.randn(8, 8) + 3 for y, args in zip(quantized, inputs, strict=True)]
        module, calls = calls_of(block, inputs, outputs)
        assert any(bool(call.padding.any()) for call in calls)
        fit_output_compensation(block, module, calls)
    missing = torch.cat([(a - b)[0] for a, b in zip(outputs, quantized, strict=True)])
    check_fit(block, *ridge(torch.cat([x[0] for x, _ in inputs]), missing))


def test_nan_is_refused(tokens):
    x = torch.randn(1, 5, 4)
    observe_all(tokens, [(x,)])
    module, calls = calls_of(tokens, [(x,)], [x * float("nan")])
    with pytest.raises(CalibrationError, match=r"output compensation.*NaN"):
        fit_output_compensation(tokens, module, calls)


@pytest.fixture
def calibrated():
    model = compensated_swin()
    calibrate(model, IMAGES, recipe("qwt"))
    return model


def test_all_swin_blocks_are_compensated_and_nearer_to_float(calibrated):
    torch.manual_seed(0)
    plain = copy.deepcopy(calibrated)
    for module in plain.modules():
        if isinstance(module, SwinBlock):
            assert module.output_compensation.weight.any()
            module.output_compensation.weight.zero_()
            module.output_compensation.bias.zero_()

    def error(model):
        with torch.no_grad():
            got = [model(x)[0] for x in IMAGES]
            with float_only(model):
                want = [model(x)[0] for x in IMAGES]
        return sum(float((a - b).square().sum()) for a, b in zip(got, want, strict=True))

    assert error(calibrated) < 0.9 * error(plain)


def test_the_float_function_stays(calibrated):
    bare = copy.deepcopy(calibrated)
    for module in bare.modules():
        if isinstance(module, SwinBlock):
            module.output_compensation.weight.zero_()
            module.output_compensation.bias.zero_()
    with torch.no_grad(), float_only(calibrated), float_only(bare):
        assert torch.equal(calibrated(IMAGES[0])[0], bare(IMAGES[0])[0])
        want = bare(IMAGES[0])[0]
    observing = copy.deepcopy(calibrated)  # which looks at the float function, too
    with torch.no_grad(), quantizer_mode(quantizers_of(observing), QuantizerMode.OBSERVE):
        assert torch.equal(observing(IMAGES[0])[0], want)
    with torch.no_grad():
        assert not torch.equal(calibrated(IMAGES[0])[0], bare(IMAGES[0])[0])


def test_blocks_are_fitted_on_what_the_compensated_ones_before_give(monkeypatch):
    given, replace_input = {}, CaptureStore.replace_input

    def note(self, block, image, index, args, kwargs):
        given[block, image] = args[0].clone()
        replace_input(self, block, image, index, args, kwargs)

    monkeypatch.setattr(CaptureStore, "replace_input", note)
    model, seen = compensated_swin(), {}
    calibrate(model, IMAGES, recipe("qwt"))
    for name, block in partition(model).items():
        block.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0].clone()))
    with torch.no_grad():
        for x in IMAGES:
            model(x)
    assert len(given) == len(IMAGES) * len(seen)
    assert all(torch.equal(x, seen[name][image]) for (name, image), x in given.items())


def test_a_float_checkpoint_loads_strictly_and_has_nothing_to_compensate():
    state = build_swin().state_dict()
    model = compensated_swin()
    with torch.no_grad():
        model.get_submodule("stages.0.blocks.0").output_compensation.bias.fill_(2.0)
    model.load_state_dict(state, strict=True)
    assert not model.get_submodule("stages.0.blocks.0").output_compensation.bias.any()


def test_a_checkpoint_without_it_is_refused(calibrated):
    state = packed_state_dict(calibrated)
    key = "stages.0.blocks.1.output_compensation.bias"
    del state[key]
    with pytest.raises(Exception, match=f"missing {key}"):
        compensated_swin().load_state_dict(state)


def test_the_layer_table_names_it():
    rows = [row for row in compensated_swin().quantization_table if row.kind == "OutputCompensation"]
    assert [row.elements for row in rows] == [64, 64]
    assert all(row.bits is None and "correction" in row.reason for row in rows)


def test_validation():
    with pytest.raises(BadInputError, match=r"quant\.output_compensation: expected True or False, got 1"):
        recipe("qwt", output_compensation=1)
    with pytest.raises(BadInputError, match=r"quant\.output_compensation: the model has no block.*SwinBlock"):
        quantize_model(nn.Sequential(nn.Linear(3, 3)), recipe("qwt").policy)


class ByKeyword(nn.Module):
    """Calls its block by keyword, the input last."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(scale=2.0, x=x)


class Scaled(Tokens):
    """Takes more than tokens."""

    def forward(self, x, scale):
        return super().forward(x) * scale


def test_a_block_may_be_called_by_keyword(monkeypatch):
    monkeypatch.setitem(COMPENSATED, Scaled, lambda block: 4)
    monkeypatch.setattr("apq_mmdet.calibration.blocks.BLOCK_CLASSES", [Scaled])
    model, x = ByKeyword(Scaled()), torch.randn(30, 4)
    quantize_model(model, recipe("qwt", w_bits=2, a_bits=2).policy)
    calibrate(model, [x], recipe("qwt", w_bits=2, a_bits=2))
    with torch.no_grad():
        by_position = model.block(x, 2.0)
        assert torch.equal(model(x), by_position)
    assert model.block.output_compensation.weight.any()
