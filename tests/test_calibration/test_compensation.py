"""Compensation against plain formulas in float64: least squares, brute force and a slow OBQ."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers import as_calls, observed, recipe
from torch import Tensor, nn

from apq_mmdet.calibration.compensation import (
    FIRST_FACTOR,
    LAST_FACTOR,
    CompensationConfig,
    compensate,
)
from apq_mmdet.calibration.spread_rounding import spread_rounding
from apq_mmdet.calibration.units import UnitCall
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model

EXACT = dict(w_bits=8, a_bits=2)  # weights so fine that nearly only the ridge regression shows
TINY = 1e-9  # as a damping: as good as none


def prepared(block, inputs, bits=None, formats=None, grads=None, floats=None):
    """A quantized block, and its calls; the units are the entries of the first axis.

    ``floats`` are inputs of the float model, where ``inputs`` are what quantized blocks give.
    """
    policy = dict(bits or dict(w_bits=3, a_bits=3))
    formats = formats or dict(all=dict(weight=dict(granularity="channel")))
    quantize_model(block, recipe("minmax", formats=formats, **policy).policy)
    entries = []
    for image, (x, output) in enumerate(zip(inputs, observed(block, [(x,) for x in inputs]), strict=True)):
        targets = output.flatten(1)
        grad = torch.randn_like(targets) if grads is None else grads[image].flatten(1)
        padding = torch.zeros(len(x), dtype=torch.int64)
        floating = None if floats is None else ((floats[image],), {})
        entries.append(UnitCall((x,), {}, targets, grad, padding, image, targets.numel(), True, floating))
    return block, as_calls(entries)


def correlated(tokens=60, width=6, images=2):
    """Inputs that hang together and have a mean: errors of one channel can be made up for by others."""
    mix = torch.randn(width, width)
    return [torch.randn(tokens + i, width) @ mix + 1.5 for i in range(images)]


# -- step 1: ridge regression -----------------------------------------------------------------------------------------


def least_squares(
    weight: Tensor, x: Tensor, quantized: Tensor, importance: Tensor, bias: bool, damping: float
) -> Tensor:
    """The ridge regression as a plain least-squares problem; the damped rows are appended to the data."""
    root = importance.sqrt()[:, None]
    if bias:
        share = importance / importance.sum()
        x, quantized = x - share @ x, quantized - share @ quantized
    a, b = root * quantized, root * (x @ weight.T)
    strength = (damping * a.square().sum(0).mean()).sqrt()
    eye = torch.eye(len(a.T), dtype=a.dtype)
    return torch.linalg.lstsq(torch.cat([a, strength * eye]), torch.cat([b, strength * weight.T])).solution.T


@pytest.mark.parametrize("damping", [TINY, 0.3])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_the_ridge_regression_and_the_bias_takes_the_mean(bias, weighted, damping):
    inputs = correlated()
    block, calls = prepared(nn.Sequential(nn.Linear(6, 4, bias=bias)), inputs, EXACT)
    layer, before = block[0], copy.deepcopy(block[0])
    x = torch.cat(inputs)
    quantized, x = layer.quantizers["input"].fake_quantize(x).double(), x.double()
    grads = torch.cat([call.grads for call in calls]).double()
    importance = grads.square().mean(1) if weighted else torch.ones(len(x), dtype=torch.float64)
    compensate(block, calls, CompensationConfig(rounding=False, ranges=0, damping=damping, weighted=weighted))
    want = least_squares(before.weight.double(), x, quantized, importance, bias, damping)
    clipped = before.quantizers["weight"].fake_quantize(want.float()).double()
    assert torch.allclose(layer.weight.double(), clipped, atol=1e-6)
    inside = (want - clipped).abs() < before.quantizers["weight"].scale[:, None]
    assert inside.double().mean() > 0.5
    assert not torch.allclose(want, before.weight.double(), atol=0.02)  # there was something to make up for
    if bias:
        error = x @ before.weight.T.double() + before.bias.double() - quantized @ layer.weight.T.double()
        assert torch.allclose(layer.bias.double(), importance @ error / importance.sum(), atol=1e-5)


def test_what_quantized_blocks_give_stands_for_what_the_float_model_has():
    floats = correlated()
    inputs = [x + torch.randn_like(x) for x in floats]
    block, calls = prepared(nn.Sequential(nn.Linear(6, 4)), inputs, EXACT, floats=floats)
    layer, before = block[0], copy.deepcopy(block[0])
    quantized = layer.quantizers["input"].fake_quantize(torch.cat(inputs)).double()
    compensate(block, calls, CompensationConfig(rounding=False, ranges=0, damping=TINY, weighted=False))
    x = torch.cat(floats).double()
    want = least_squares(before.weight.double(), x, quantized, torch.ones(len(x), dtype=torch.float64), True, TINY)
    clipped = before.quantizers["weight"].fake_quantize(want.float()).double()
    assert torch.allclose(layer.weight.double(), clipped, atol=1e-6)


def test_only_the_mean_is_left_to_a_bias():
    """An input that is off by a constant costs a layer with a bias nothing."""
    inputs = [torch.randn(50, 3).clamp(-1, 1)]
    block, calls = prepared(nn.Sequential(nn.Linear(3, 2)), inputs, dict(w_bits=8, a_bits=8))
    want, layer = copy.deepcopy(block[0]), block[0]
    with torch.no_grad():
        layer.quantizers["input"].forward = lambda x: x + torch.tensor([5.0, -3.0, 1.0])
    compensate(block, calls, CompensationConfig(ranges=0))
    with torch.no_grad(), float_only(want):
        assert torch.allclose(block(inputs[0]), want(inputs[0]), atol=0.02)


# -- step 2: ranges ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["channel", 3, "tensor"])
def test_ranges_are_the_best_of_their_group(granularity):
    formats = dict(all=dict(weight=dict(granularity=granularity)))
    block, calls = prepared(nn.Sequential(nn.Linear(5, 6)), correlated(width=5), dict(w_bits=3, a_bits=8), formats)
    layer, quantizer = block[0], block[0].quantizers["weight"]
    weight = layer.weight.detach().double()
    with torch.no_grad():
        rows = torch.cat([layer.quantizers["input"](call.args[0]) for call in calls]).double()
    rows = rows - rows.mean(0)
    hessian = rows.T @ rows
    compensate(block, calls, CompensationConfig(False, False, ranges=9, damping=3.0, weighted=False))
    groups = weight.view(quantizer.groups, -1, 5)
    chosen = []
    for group in groups:
        low, high = group.min().clamp(max=0), group.max().clamp(min=0)
        candidates = []
        for i in range(9):
            factor = FIRST_FACTOR + i * (LAST_FACTOR - FIRST_FACTOR) / 8
            scale = (factor * (high - low) / 7).float().double()
            zero = (-factor * low / scale).round()
            gap = ((group / scale).round().clamp(-zero, 7 - zero) * scale) - group
            candidates.append((float((gap @ hessian @ gap.T).trace()), float(scale)))
        chosen.append(min(candidates)[1])
    assert quantizer.scale.tolist() == pytest.approx(chosen, rel=1e-6)
    assert (
        len({round(s / float(g.max() - g.min()), 4) for s, g in zip(chosen, groups, strict=True)}) > 1
        or len(chosen) == 1
    )


def test_no_ranges_keeps_those_of_the_search():
    block, calls = prepared(nn.Sequential(nn.Linear(5, 6)), correlated(width=5))
    before = copy.deepcopy(block[0].quantizers["weight"])
    compensate(block, calls, CompensationConfig(ranges=0))
    assert torch.equal(block[0].quantizers["weight"].scale, before.scale)
    assert torch.equal(block[0].quantizers["weight"].zero_point, before.zero_point)


# -- layers -----------------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    """Two layers, the second of which could only make up for the first's errors if it knew the float input."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@torch.no_grad()
def test_later_layers_make_up_for_the_weights_of_earlier_ones():
    """Float inputs are those of the weights of before, although these are gone by then."""
    inputs = correlated(tokens=200, images=1)
    block, calls = prepared(Chain(), inputs, dict(w_bits=2, a_bits=8))
    before, x = copy.deepcopy(block), inputs[0]
    compensate(block, calls, CompensationConfig(rounding=False, ranges=0, damping=TINY, weighted=False))
    with float_only(before):
        hidden = before.first(x).tanh().double()
    quantized = block.second.quantizers["input"](block.first(x).tanh()).double()
    weight = before.second.weight.double()
    want = least_squares(weight, hidden, quantized, torch.ones(len(x), dtype=torch.float64), True, TINY)
    assert torch.equal(block.second.weight, before.second.quantizers["weight"].fake_quantize(want.float()))
    error = hidden @ weight.T + before.second.bias.double() - quantized @ block.second.weight.T.double()
    assert torch.allclose(block.second.bias.double(), error.mean(0), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("conv", [dict(), dict(padding=1, stride=2), dict(padding=2, dilation=2, bias=False)], ids=str)
def test_convolutions_are_the_sum_over_their_windows(conv):
    inputs = [torch.randn(3, 2, 7, 6) for _ in range(2)]
    layer = nn.Conv2d(2, 3, 3, **conv)
    block, calls = prepared(nn.Sequential(layer), inputs, dict(w_bits=8, a_bits=2))
    before = copy.deepcopy(layer)
    compensate(block, calls, CompensationConfig(rounding=False, ranges=0, damping=0.1))
    (ph, pw), (sh, sw), (dh, dw) = layer.padding, layer.stride, layer.dilation
    rows: dict[str, list[Tensor]] = dict(x=[], quantized=[], importance=[])
    for call in calls:
        x = call.args[0]
        pairs = [F.pad(t.double(), (pw, pw, ph, ph)) for t in (x, layer.quantizers["input"](x))]
        with float_only(before):
            grads = call.grads.double().view_as(before(x))
        for b, i, j in itertools.product(range(len(x)), range(grads.shape[2]), range(grads.shape[3])):
            for key, t in zip(("x", "quantized"), pairs, strict=True):
                rows[key].append(
                    t[b, :, i * sh : i * sh + 2 * dh + 1 : dh, j * sw : j * sw + 2 * dw + 1 : dw].flatten()
                )
            rows["importance"].append(grads[b, :, i, j].square().mean())
    x, quantized, importance = (torch.stack(part) for part in rows.values())
    want = least_squares(before.weight.flatten(1).double(), x, quantized, importance, layer.bias is not None, 0.1)
    want = before.quantizers["weight"].fake_quantize(want.float().view_as(layer.weight))
    assert torch.equal(layer.weight, want)
    assert not torch.equal(layer.weight, before.quantizers["weight"].fake_quantize(before.weight))


@pytest.mark.parametrize("granularity", ["channel", "tensor", 2])
@pytest.mark.parametrize("symmetric", [False, True])
def test_weights_end_on_the_grid(granularity, symmetric):
    formats = dict(all=dict(weight=dict(granularity=granularity, symmetric=symmetric)))
    block, calls = prepared(nn.Sequential(nn.Linear(6, 4)), correlated(), formats=formats)
    compensate(block, calls, CompensationConfig())
    weight, quantizer = block[0].weight.detach(), block[0].quantizers["weight"]
    assert torch.equal(quantizer.fake_quantize(weight), weight)
    codes = quantizer.encode(weight)
    assert torch.equal(quantizer.decode(codes), weight)
    assert quantizer.code_min <= int(codes.min()) <= int(codes.max()) <= quantizer.code_max
    fresh = nn.Sequential(nn.Linear(6, 4))
    quantize_model(fresh, recipe("minmax", w_bits=3, a_bits=3, formats=formats).policy)
    fresh.load_state_dict(packed_state_dict(block))
    assert torch.equal(fresh[0].weight, weight)


def test_the_rounding_of_a_layer_is_spread():
    block, calls = prepared(nn.Sequential(nn.Linear(12, 8, bias=False)), correlated(width=12))
    weight, quantizer = block[0].weight.detach().clone(), copy.deepcopy(block[0].quantizers["weight"])
    with torch.no_grad():
        rows = torch.cat([block[0].quantizers["input"](call.args[0]) for call in calls]).double()
    hessian = rows.T @ rows
    hessian += 0.01 * hessian.diagonal().mean() * torch.eye(12)
    compensate(block, calls, CompensationConfig(activations=False, ranges=0, damping=0.01, weighted=False))
    zero_point = quantizer.zero_point[:, None].double()
    bounds = (quantizer.scale[:, None].double(), -zero_point, 7 - zero_point)
    codes = spread_rounding(weight.double(), hessian, *bounds)
    assert torch.equal(quantizer.encode(block[0].weight), (codes + zero_point).int())
    assert not torch.equal(quantizer.encode(block[0].weight), quantizer.encode(weight))


@torch.no_grad()
def test_the_error_of_the_layer_falls():
    inputs = correlated(images=1)
    block, calls = prepared(nn.Sequential(nn.Linear(6, 4, bias=False)), inputs)
    before, x = copy.deepcopy(block), inputs[0]
    compensate(block, calls, CompensationConfig(weighted=False))
    with float_only(before):
        want = before(x)
    errors = [float((b(x) - want).double().square().sum()) for b in (before, block)]
    assert errors[1] < 0.9 * errors[0]


class Sometimes(nn.Module):
    """The second layer never runs, the third has no say in the output, the fourth sees a constant."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        y = self.a(x)
        if len(x) > 1000:
            y = self.b(y)
        return y + 0 * self.c(y).detach() + self.d(torch.ones_like(x))


@pytest.mark.parametrize("weighted", [True, False])
def test_layers_that_nothing_speaks_for_stay(weighted):
    model = Sometimes()
    quantize_model(model, recipe("minmax", w_bits=3, a_bits=3).policy)
    model.b.quantizers["input"].observe(torch.randn(9, 4))
    x = torch.randn(30, 4)
    (output,) = observed(model, [(x,)])
    units = UnitCall((x,), {}, output, torch.randn_like(output), torch.zeros(30, dtype=torch.int64), 0, 120, True)
    before = copy.deepcopy(model)
    compensate(model, as_calls([units]), CompensationConfig(weighted=weighted))
    stayed = {n for n in "abcd" if torch.equal(getattr(model, n).weight, getattr(before, n).weight)}
    assert stayed == ({"b", "c", "d"} if weighted else {"b", "d"})


class Other(nn.Module):
    """Layers that cannot be written as one matrix product of unfolded inputs."""

    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 4, 3, groups=2, padding=1)
        self.mirrored = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.same = nn.Conv2d(4, 4, 3, padding="same")
        self.up = nn.ConvTranspose2d(4, 4, 2)

    def forward(self, x):
        return self.up(self.same(self.mirrored(self.grouped(x))))


def test_other_layers_stay():
    block, calls = prepared(Other(), [torch.randn(2, 4, 6, 6)])
    before = copy.deepcopy(block)
    compensate(block, calls, CompensationConfig())
    assert all(torch.equal(a, b) for a, b in zip(block.parameters(), before.parameters(), strict=True))


def test_layers_with_too_many_inputs_stay(monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.columns.MOST_INPUTS", 5)
    block, calls = prepared(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), correlated())
    before = copy.deepcopy(block)
    compensate(block, calls, CompensationConfig())
    assert torch.equal(block[0].weight, before[0].weight)
    assert not torch.equal(block[1].weight, before[1].weight)


def test_calls_without_rois_say_nothing():
    inputs = [torch.randn(20, 6), torch.randn(0, 6), torch.randn(20, 6)]
    torch.manual_seed(0)
    states = []
    for chosen in (inputs, inputs[::2]):
        torch.manual_seed(0)
        block, calls = prepared(nn.Sequential(nn.Linear(6, 4)), chosen)
        compensate(block, calls, CompensationConfig(weighted=False))
        states.append(block[0].weight.detach())
    assert torch.equal(*states)


def test_nan_is_refused_with_the_layers_name():
    block, calls = prepared(Chain(), [torch.randn(10, 6)])
    bad = calls[0].map(lambda t: t.index_fill(0, torch.tensor([3]), float("nan")) if t.is_floating_point() else t)
    with pytest.raises(CalibrationError, match=r"layer 'first'.*NaN or infinite"):
        compensate(block, as_calls([bad]), CompensationConfig())


@torch.no_grad()
def test_important_tokens_count_more():
    """Half of the tokens have a hundred times the gradient: their error falls, at the cost of the others."""
    errors = {True: torch.zeros(2), False: torch.zeros(2)}
    grads = torch.ones(200, 4)
    grads[:100] = 100
    for seed in range(5):
        for weighted, total in errors.items():
            torch.manual_seed(seed)
            x = torch.cat([torch.randn(100, 6) @ torch.randn(6, 6) for _ in range(2)])
            block, calls = prepared(nn.Sequential(nn.Linear(6, 4)), [x], dict(w_bits=4, a_bits=2), grads=[grads])
            with float_only(block):
                want = block(x)
            compensate(block, calls, CompensationConfig(weighted=weighted))
            total += (block(x) - want).square().view(2, -1).mean(1)
    assert errors[True][0] < 0.9 * errors[False][0]
    assert errors[True][1] > 1.1 * errors[False][1]


@pytest.mark.parametrize(("weighted", "expected"), [(False, [8, 6, 4]), (True, [8, 7, 6])])
def test_blocks_run_no_further_than_to_what_is_looked_at(weighted, expected):
    """Each of two calls for their order; then float and quantized for three layers, in whole where gradients count."""
    block, calls = prepared(nn.Sequential(*(nn.Linear(6, 6) for _ in range(3))), correlated())
    runs = [0, 0, 0]

    def count(index: int) -> None:
        runs[index] += 1

    for index, layer in enumerate(block):
        layer.register_forward_pre_hook(lambda *_, index=index: count(index))
    compensate(block, calls, CompensationConfig(weighted=weighted))
    assert runs == expected


def test_weights_are_quantized_once_for_each_look_at_the_block(monkeypatch):
    block, calls = prepared(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), correlated(images=3))
    monkeypatch.setattr("apq_mmdet.calibration.units.TILE_ELEMENTS", 6)  # a token a tile
    quantized = []
    for layer in block:
        quantizer = layer.quantizers["weight"]
        fake_quantize = quantizer.fake_quantize
        monkeypatch.setattr(quantizer, "fake_quantize", lambda x, q=fake_quantize: quantized.append(1) or q(x))
    compensate(block, calls, CompensationConfig(weighted=False))
    assert len(quantized) < 20  # of 183 tokens
