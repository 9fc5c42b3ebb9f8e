"""One layer of every kind, every objective and granularity: the choice is that of the plain formula in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import recipe
from torch import nn

from apq_mmdet.calibration import scoring, units
from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.search import search_block
from apq_mmdet.calibration.store import TensorStore
from apq_mmdet.calibration.units import UnitCalls, to_units
from apq_mmdet.layers import quantize_model, quantized_layers, quantizers_of
from apq_mmdet.layers.matmul import FloatAttentionValueProduct, FloatQueryKeyProduct
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode
from apq_mmdet.registry import QUANTIZERS

SIZES = (5, 9, 13)  # units of three images, odd
CANDIDATES = 24
LAYERS = {
    "linear": (nn.Linear(11, 6), lambda n: [torch.randn(n, 3, 11)]),
    "conv": (nn.Conv2d(3, 4, 3, stride=2), lambda n: [torch.randn(1, 3, n, 7)]),
    "deconv": (nn.ConvTranspose2d(3, 4, 2, stride=2), lambda n: [torch.randn(1, 3, n, 3)]),
    "query_key": (FloatQueryKeyProduct(2), lambda n: [torch.randn(n, 2, 7, 5), torch.randn(n, 2, 7, 5)]),
    "attention_value": (
        FloatAttentionValueProduct(2),
        lambda n: [torch.randn(n, 2, 7, 7).mul(3).softmax(-1), torch.randn(n, 2, 7, 5)],
    ),
}
GRANULARITIES = {  # or formats of inputs that follow the data
    "linear": ["tensor", "channel", 3, "token_affine", "dynamic_affine"],
    "conv": ["tensor", "channel", "dynamic_affine"],
    "deconv": ["tensor", "channel"],
    "query_key": ["tensor", "head"],
    "attention_value": ["tensor", "head"],
}
ROLES = {"query_key": ["query", "key"], "attention_value": ["attention", "value"]}
OBJECTIVES = [
    dict(type="hessian"),
    dict(type="mse"),
    *(dict(type="hessian", eliminate=0.1, eliminate_by=by) for by in ("error", "gradient", "weighted")),
    dict(type="mse", eliminate=0.9, eliminate_by="error"),
    dict(type="cosine"),
]


def apart(output, target, kind, metric):
    """1 - cos of each unit: of a block a whole call here, of a layer a token or an entry of the first axis."""
    units = -1 if kind == "Linear" else len(output)
    rows = [
        t.double().reshape(units, t.shape[-1]) if kind == "Linear" else t.double().flatten(1) for t in (output, target)
    ]
    rows = rows if metric == "module" else [t.reshape(1, -1) for t in rows]
    return float((1 - F.cosine_similarity(*rows)).sum())


def plain_errors(layer, calls, role, factors, objective, metric):
    """Each candidate by the formula: sort, drop the lowest, add up, in float64."""
    errors = []
    for factor in factors:
        layer.quantizers[role].set_range_factor(factor)
        total = 0.0
        for call in calls:
            output = layer(*(x.double() for x in call.args))
            if objective["type"] == "cosine":
                total += apart(output, call.outputs[0], layer.kind, metric)
                continue
            e = (output - call.outputs[0]).reshape(-1)
            g = call.grads[0].double().reshape(-1)
            cost = e.square() if objective["type"] == "mse" else (g * e).square()
            rank = {"error": e, "gradient": g, "weighted": g * e}[objective.get("eliminate_by", "error")].abs()
            kept = rank.argsort()[int(objective.get("eliminate", 0.0) * len(e)) :]
            total += float(cost[kept].sum())
        errors.append(total)
    return errors


@pytest.mark.parametrize("metric", ["module", "block"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize(("kind", "granularity"), [(k, g) for k, found in GRANULARITIES.items() for g in found])
def test_the_choice_of_the_plain_formula(kind, granularity, objective, metric):
    check_choice(kind, granularity, objective, metric)


@pytest.mark.parametrize("objective", OBJECTIVES[1:3], ids=str)
@pytest.mark.parametrize("kind", ["linear", "query_key", "attention_value"])
def test_the_choice_of_the_plain_formula_in_small_tiles(kind, objective, monkeypatch):
    """At a layer, whose calls have units: a tile is at most two of them."""
    monkeypatch.setattr(units, "TILE_ELEMENTS", 60)
    monkeypatch.setattr(scoring, "BUFFER_ELEMENTS", 600)
    check_choice(kind, GRANULARITIES[kind][-1], objective, "module")


@pytest.mark.parametrize("metric", ["module", "block"])
@pytest.mark.parametrize("kind", GRANULARITIES)
def test_the_choice_of_the_plain_formula_where_errors_are_tiny(kind, metric):
    """At eight bits a cosine differs from 1 by little but what float32 rounds off."""
    check_choice(kind, "tensor", dict(type="cosine"), metric, bits=8, candidates=200)


def check_choice(kind, granularity, objective, metric, bits=4, candidates=CANDIDATES):
    """Search the one layer of this kind, and compare."""
    layer, inputs = LAYERS[kind]
    model = nn.ModuleDict({"layer": copy.deepcopy(layer)})
    roles = ROLES.get(kind, ["weight"])
    rule = {role: dict(granularity=granularity) for role in roles}
    if granularity in QUANTIZERS.module_dict:
        rule = dict(kind=["Linear", "Conv2d"][kind == "conv"], input=dict(format=granularity))
    settings = recipe(
        "apq",
        w_bits=bits,
        a_bits=bits,
        formats=dict(all=rule),
        search=dict(
            grids=dict.fromkeys(("Linear", "Conv2d", "ConvTranspose2d", "MatMul"), (0.6, 1.1, candidates)),
            objective=objective,
            metric=metric,
            rounds=1,
        ),
    )
    quantize_model(model, settings.policy)
    ((_, quantized),) = quantized_layers(model)
    if granularity == "token_affine":
        quantized.input_centers.normal_()
    calls = []
    with torch.no_grad(), quantizer_mode(quantizers_of(model), QuantizerMode.OBSERVE):
        for image, size in enumerate(SIZES):
            args = tuple(inputs(size))
            output = quantized(*args)
            calls.append(BlockCall(args, {}, [output], [torch.randn_like(output)], image))
    if "weight" in quantized.quantizers:
        quantized.quantizers["weight"].observe(quantized.weight)
    taken_apart = UnitCalls(TensorStore(memory=2**20), "layer")
    for call in calls:
        taken_apart.add(to_units(quantized, call))
    got = search_block(quantized, taken_apart, settings.search)
    exact = copy.deepcopy(quantized).double()
    for quantizer in quantizers_of(exact):
        quantizer.scale = quantizer.scale.float()
        quantizer.set_range_factor(1.0)
    assert set(got) == set(quantized.roles)
    for role in quantized.roles:  # in the order of the search
        factors = settings.search.factors(quantized.kind, quantized.quantizers[role].min_factor)
        with torch.no_grad():
            errors = plain_errors(exact, calls, role, factors, objective, metric)
        assert errors[factors.index(got[role])] == pytest.approx(min(errors), rel=1e-5)
        exact.quantizers[role].set_range_factor(got[role])
