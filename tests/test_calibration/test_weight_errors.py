"""Errors of a weight's candidate ranges from sums over tokens, against running the layer for each."""

import copy

import pytest
import torch
from helpers import as_calls, observed, recipe
from torch import nn

from apq_mmdet.calibration import weight_errors as module
from apq_mmdet.calibration.scoring import Candidate
from apq_mmdet.calibration.units import UnitCall
from apq_mmdet.calibration.weight_errors import in_closed_form, weight_errors
from apq_mmdet.layers.base import to_quantized
from apq_mmdet.quantizers import AffineQuantizer, QuantizerMode

CANDIDATES = [Candidate(factor) for factor in (0.3, 0.5, 0.8, 1.1)]
CASES = {
    "linear": (nn.Linear(5, 7), [torch.randn(9, 5), torch.randn(4, 5)]),
    "linear without bias": (nn.Linear(5, 3, bias=False), [torch.randn(2, 6, 5)]),
    "linear of a whole call": (nn.Linear(5, 4), [torch.randn(1, 6, 5)]),
}


def quantized(layer, inputs, bits):
    weight = AffineQuantizer(bits, axis=0, groups=len(layer.weight), symmetric=True)
    layer = to_quantized(layer, {"weight": weight, "input": AffineQuantizer(bits)}, divided=True)
    layer.input_factors.copy_(torch.linspace(0.5, 2.0, 5))
    observed(layer, [(x,) for x in inputs])
    return layer


def calls_of(layer, inputs):
    calls = []
    for image, x in enumerate(inputs):
        with torch.no_grad():
            targets = layer(x).reshape(len(x), -1)
        padding = torch.zeros(len(x), dtype=torch.int64)
        calls.append(UnitCall((x,), {}, targets, None, padding, image, targets.numel(), len(x) > 1))
    return as_calls(calls)


@pytest.mark.parametrize("tokens", [2**12, 4])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("case", CASES)
def test_differences_are_those_of_the_plain_formula(case, bits, tokens, monkeypatch):
    monkeypatch.setattr(module, "TOKENS", tokens)
    layer, inputs = copy.deepcopy(CASES[case])
    layer = quantized(layer, inputs, bits)
    for quantizer in layer.quantizers.values():
        quantizer.mode = QuantizerMode.FLOAT
    calls = calls_of(layer, inputs)
    for quantizer in layer.quantizers.values():
        quantizer.mode = QuantizerMode.CODES  # as in a search
    with torch.no_grad():
        got = weight_errors(layer, calls, CANDIDATES)
    assert all(quantizer.mode is QuantizerMode.CODES for quantizer in layer.quantizers.values())
    plain = []
    for quantizer in layer.quantizers.values():
        quantizer.mode = QuantizerMode.QUANTIZE
    for candidate in CANDIDATES:
        layer.quantizers["weight"].set_range_factor(candidate.factor)
        with torch.no_grad():
            outputs = [layer(call.args[0]).reshape(call.targets.shape) for call in calls]
        errors = [(y - call.targets.double()).square().sum() for y, call in zip(outputs, calls, strict=True)]
        plain.append(torch.stack(errors).sum())
    plain = torch.stack(plain).double()
    assert got.dtype == torch.float64
    assert torch.allclose(got - got[0], plain - plain[0], rtol=1e-4, atol=1e-5 * float(plain.max()))


def test_all_processes_go_by_what_the_first_computed(monkeypatch):
    monkeypatch.setattr(module, "gather", lambda errors: [errors + 1, errors])
    layer, inputs = copy.deepcopy(CASES["linear"])
    layer = quantized(layer, inputs, bits=4)
    calls = calls_of(layer, inputs)
    with torch.no_grad():
        first = weight_errors(layer, calls, CANDIDATES)
        monkeypatch.setattr(module, "gather", lambda errors: [errors, errors + 1])
        assert torch.equal(first, weight_errors(layer, calls, CANDIDATES) + 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        (dict(metric="block"), False),
        (dict(objective=dict(type="hessian")), False),
        (dict(objective=dict(type="mse", eliminate=0.1)), False),
        (dict(role="input"), False),
        (dict(candidates=1), False),  # 2 * 5 products for the sums against 7 for the run of one candidate
        (dict(most=4), False),
        (dict(layer=nn.Conv2d(5, 7, 1)), False),
    ],
)
def test_where_there_is_a_closed_form(changes, expected, monkeypatch):
    monkeypatch.setattr(module, "MOST_INPUTS", changes.pop("most", 2**13))
    candidates, role = changes.pop("candidates", 4), changes.pop("role", "weight")
    layer = to_quantized(changes.pop("layer", nn.Linear(5, 7)), {"weight": AffineQuantizer(4)})
    search = recipe("apq", search={"metric": "module", "objective": dict(type="mse"), **changes}).search
    assert in_closed_form(search, layer, role, candidates) is expected


def test_a_layer_that_never_ran_has_no_errors():
    layer = quantized(*copy.deepcopy(CASES["linear"]), bits=4)
    assert weight_errors(layer, as_calls([]), CANDIDATES).tolist() == [0.0] * 4
