"""A replay gives the bits of the block itself, or is not used."""

import pytest
import torch
from helpers import recipe
from test_search import prepared
from torch import nn

from apq_mmdet.calibration.tape import Replays, Tape, flushed_denormals
from apq_mmdet.calibration.units import to_units, unit_module
from apq_mmdet.layers import integer, quantize_model, quantized_layers, quantizers_of
from apq_mmdet.layers.integer import in_integer_precision
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode
from apq_mmdet.quantizers.affine import shifted_codes
from apq_mmdet.quantizers.fused import Fused

FACTORS = (1.0, 0.5, 0.8, 0.3)
OPERATORS = torch.library.Library("apq_mmdet_tests", "FRAGMENT")
for arguments, formula in {
    "sum_of_lists(Tensor[][] lists)": lambda lists: sum(tensor for part in lists for tensor in part),
    "sum_of_table(Dict(str, Tensor) table)": lambda table: sum(table.values()),
}.items():
    OPERATORS.define(f"{arguments} -> Tensor")
    OPERATORS.impl(arguments.partition("(")[0], formula, "CompositeExplicitAutograd")


def parameters(quantizer):
    return [quantizer.parameters_for(*quantizer.observed, factor) for factor in FACTORS]


def own_outputs(module, quantizer, *args):
    outputs = []
    for candidate in parameters(quantizer):
        quantizer.set_parameters(*candidate)
        outputs.append(module(*args))
    return outputs


def equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def check_replays(block, quantizer, *args):
    """Outputs come from the tape and have the block's own bits."""
    replays = Replays(block, quantizer)
    found = list(replays.outputs(parameters(quantizer), 0, args, {}))
    assert replays._trusted
    assert equal(found, own_outputs(block, quantizer, *args))


@pytest.mark.parametrize("mode", [QuantizerMode.QUANTIZE, QuantizerMode.CODES])
@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
@torch.no_grad()
def test_every_quantizer_of_a_swin_block(index, mode):
    block, calls = prepared(index, recipe("apq"))
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
    for _, layer in quantized_layers(block):
        for quantizer in layer.quantizers.values() if layer.may_take_codes else ():
            quantizer.mode = mode
    view, call = unit_module(block), to_units(block, calls[0])
    for name, layer in quantized_layers(block):
        for role, quantizer in layer.quantizers.items():
            replays = Replays(view, quantizer)
            found = list(replays.outputs(parameters(quantizer), 0, call.args, {}))
            assert replays._trusted, f"{name}.{role}"
            assert equal(found, own_outputs(view, quantizer, *call.args)), f"{name}.{role}"
            again = replays.outputs(parameters(quantizer)[::-1], 0, call.args, {})
            assert equal(list(again)[::-1], found)
            quantizer.set_range_factor(1.0)


@torch.no_grad()
def test_what_comes_before_is_not_computed_again():
    block, calls = prepared(0, recipe("apq"))
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
    view, call = unit_module(block), to_units(block, calls[0])
    tape = Tape(view, block.ffn.layers[1].quantizers["input"])
    want = tape.record(*call.args)
    block.norm1.weight.add_(1)
    assert torch.equal(tape.replay(), want)
    assert not torch.equal(view(*call.args), want)
    assert len(tape._steps) < 12  # one linear, a residual sum, the padding
    early = Tape(view, block.attn.w_msa.qkv.quantizers["weight"])
    early.record(*call.args)
    assert len(early._steps) > 3 * len(tape._steps)


@torch.no_grad()
def test_integer_products_stay_integer_products(monkeypatch):
    monkeypatch.setattr(integer, "INT8_UNITS", False)
    block, _ = prepared(0, recipe("apq"))
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
        quantizer.mode = QuantizerMode.CODES
    linear = block.ffn.layers[1]
    tape = Tape(linear, linear.quantizers["input"])
    tape.record(torch.randn(7, linear.in_features))
    (product,) = [step for step in tape._steps if step.narrow]
    seen, multiply = [], product.function
    product.function = lambda *args: seen.append(in_integer_precision()) or multiply(*args)
    tape.replay()
    assert seen == [True]
    assert not in_integer_precision()


def test_denormals_are_flushed_and_then_no_more():
    tiny = torch.full((100,), 1e-40)
    with flushed_denormals():
        assert not (tiny * 1.0).any()
        with flushed_denormals():
            pass
        assert not (tiny * 1.0).any()
    assert (tiny * 1.0).all()


class Block(nn.Module):
    """Two linears with something in between; the first quantizer is searched."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.between = between

    def forward(self, x):
        return self.b(self.between(self.a(x), x.clone()))


def quantized(between):
    block, x = Block(between), torch.randn(5, 6)
    quantize_model(block, recipe("minmax").policy)
    with quantizer_mode(quantizers_of(block), QuantizerMode.OBSERVE):
        block(x)
    for layer in (block.a, block.b):
        layer.quantizers["weight"].observe(layer.weight)
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
    return block, x


def multiply_a_sparse_matrix(y, x):
    return torch.sparse.mm(torch.eye(len(y)).to_sparse(), y)


def write_into_a_constant(y, x):
    x[:, :2].add_(y[:, :2])
    return x


def write_over_what_was_read(y, x):
    z = y * x
    x.zero_()
    return z


def use_a_number(y, x):
    return y * float(y.max())


def choose_by_value(y, x):
    return y if y.sum() > 0 else x


def count(y, x):
    return y + len(y[y > 0.1])


UNREPLAYABLE = [
    multiply_a_sparse_matrix,
    write_into_a_constant,
    write_over_what_was_read,
    use_a_number,
    choose_by_value,
    count,
]


@pytest.mark.parametrize("between", UNREPLAYABLE)
@torch.no_grad()
def test_what_cannot_be_replayed_is_seen(between):
    block, x = quantized(between)
    quantizer = block.a.quantizers["input"]
    tape = Tape(block, quantizer)
    tape.record(x)
    assert not tape.replayable
    found = list(Replays(block, quantizer).outputs(parameters(quantizer), 0, (x,), {}))
    assert equal(found, own_outputs(block, quantizer, x))


@torch.no_grad()
def test_what_torch_does_not_see_is_found_by_comparison():
    block, x = quantized(lambda y, x: torch.from_numpy(y.numpy() * 2))
    quantizer = block.a.quantizers["input"]
    replays = Replays(block, quantizer)
    found = list(replays.outputs(parameters(quantizer), 0, (x,), {}))
    assert replays._trusted is False
    assert equal(found, own_outputs(block, quantizer, x))


def several_outputs(y, x):
    left, right = y.split(3, dim=1)
    return torch.cat([right, left], 1) + torch.stack([x, x]).sum(0)


def nested_arguments(y, x):
    return torch.ops.apq_mmdet_tests.sum_of_lists([[y, x], [y]]) + x


def arguments_in_a_dict(y, x):
    return torch.ops.apq_mmdet_tests.sum_of_table({"y": y, "x": x}) + x


def write_into_what_changes(y, x):
    y.mul_(2)
    y[:, 0] = x[:, 0]
    return torch.add(y, x, out=torch.empty_like(y).copy_(y))


def write_into_an_operand(y, x):
    return torch.add(y, x, out=y)


def write_into_a_constant_that_only_constants_see(y, x):
    return y + x.add_(1).mul_(2)


@pytest.mark.parametrize(
    "between",
    [
        several_outputs,
        nested_arguments,
        arguments_in_a_dict,
        write_into_what_changes,
        write_into_an_operand,
        write_into_a_constant_that_only_constants_see,
    ],
)
@torch.no_grad()
def test_what_can_be_replayed(between):
    block, x = quantized(between)
    check_replays(block, block.a.quantizers["weight"], x)


@torch.no_grad()
def test_compiled_formulas_stay_compiled(monkeypatch):
    compile = torch.compile  # the compiler's backend is not what is tested here
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile(function, backend="eager", dynamic=True))
    fused = Fused(shifted_codes.function, devices=("cpu",))
    monkeypatch.setattr("apq_mmdet.quantizers.affine.shifted_codes", fused)
    block, x = quantized(lambda y, x: y)
    for quantizer in quantizers_of(block):
        quantizer.mode = QuantizerMode.CODES
    check_replays(block, block.a.quantizers["input"], x)
    assert fused._compiled is not None
    assert not fused._failed


@torch.no_grad()
def test_a_layer_that_runs_twice():
    block, x = quantized(lambda y, x: y)
    block.b = block.a
    check_replays(block, block.a.quantizers["input"], x)


@torch.no_grad()
def test_forgotten_arguments_are_recorded_anew():
    block, x = quantized(lambda y, x: y)
    quantizer = block.a.quantizers["input"]
    replays = Replays(block, quantizer)
    list(replays.outputs(parameters(quantizer), 0, (x,), {}))
    replays.forget()
    found = list(replays.outputs(parameters(quantizer), 0, (x + 1,), {}))
    assert equal(found, own_outputs(block, quantizer, x + 1))
