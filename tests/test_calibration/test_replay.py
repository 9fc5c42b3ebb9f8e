"""What layers see in a float run of their block: all of them, or one in a run that ends behind it."""

import pytest
import torch
from helpers import as_calls, build_swin, observed, recipe
from torch import nn

from apq_mmdet.calibration.blocks import BlockCall, partition
from apq_mmdet.calibration.replay import layer_calls, layer_runs
from apq_mmdet.calibration.search import SlotErrors
from apq_mmdet.calibration.store import TensorStore
from apq_mmdet.calibration.units import to_units, unit_module
from apq_mmdet.layers import float_only, quantize_model, quantized_layers


def swin_block_call():
    """A quantized Swin block that is still float, and a call of it."""
    swin = build_swin()
    quantize_model(swin, recipe("minmax").policy)
    block = list(partition(swin).values())[1]
    x = torch.randn(1, 10 * 16, 8)
    with torch.no_grad(), float_only(block):
        output = block(x, (10, 16))
    return block, BlockCall((x, (10, 16)), {}, [output], [torch.randn_like(output)], 0)


def test_module_gradients_are_those_of_the_float_block():
    block, block_call = swin_block_call()
    view, call = unit_module(block), to_units(block, block_call)
    layers = [layer for _, layer in quantized_layers(block)]
    recorded = dict(layer_calls(view, call, layers, gradients=True, runs=len(layers)))
    last = recorded[block.ffn.layers[1]]
    # the last linear is followed by the residual sum alone, and never sees padding
    dense = block_call.grads[0][0]
    assert last.grads.shape == dense.shape
    assert torch.equal(last.grads.sort(0).values, dense.sort(0).values)
    energy = last.grads.square().sum(1)
    assert torch.equal(energy, energy.sort(descending=True).values)  # each layer's most important tokens first
    with float_only(block), torch.no_grad():
        assert torch.equal(block.ffn.layers[1](*last.args), last.targets)


def test_calls_of_layers_without_gradients_take_no_more_than_the_run_up_to_them():
    block, block_call = swin_block_call()
    view, call = unit_module(block), to_units(block, block_call)
    runs = layer_runs(view, as_calls([call]))
    assert runs == dict.fromkeys(dict(quantized_layers(view)), 1)
    layers = {name: view.get_submodule(name) for name in runs}  # as they are executed
    whole = dict(layer_calls(view, call, list(layers.values()), gradients=False, runs=len(layers)))
    ran = []
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    for position, (name, layer) in enumerate(layers.items()):
        ran.clear()
        ((found, alone),) = layer_calls(view, call, [layer], gradients=False, runs=1)
        assert found is layer
        assert ran == list(layers)[: position + 1], name
        assert alone.grads is None
        assert not alone.targets.requires_grad
        assert torch.equal(alone.targets, whole[layer].targets)
        with float_only(block), torch.no_grad():
            assert torch.equal(layer(*alone.args).reshape(alone.targets.shape), alone.targets)


class Twice(nn.Module):
    """A block whose first layer runs once on some inputs and twice on others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        y = self.first(x)
        return self.last(self.first(y.tanh()) if x.dim() == 2 else y)


@pytest.mark.parametrize("order", [(2, 3), (3, 2)])
def test_layers_that_run_twice_are_seen_twice(order, monkeypatch):
    """However a search looks at them: all layers at once, or each in a run that ends behind it."""
    block = Twice()
    quantize_model(block, recipe("minmax", scope="detector").policy)
    inputs = [torch.randn(4, *[2] * (dims - 2), 6) for dims in order]
    observed(block, [(x,) for x in inputs])
    with float_only(block), torch.no_grad():
        calls = as_calls(
            [to_units(block, BlockCall((x,), {}, [block(x)], None, image)) for image, x in enumerate(inputs)]
        )
    assert layer_runs(block, calls) == {"first": 2, "last": 1}
    search = recipe("apq", search=dict(metric="module", objective=dict(type="mse"))).search
    for most in (2**28, 0):
        monkeypatch.setattr(TensorStore, "room", most)
        errors = SlotErrors(block, calls, search, layer_runs(block, calls))
        found = [len(errors.recorded(layer)) for layer in (block.first, block.last)]
        assert found == [3, 2]


def test_runs_are_told_in_the_order_of_the_images_whichever_process_has_them(monkeypatch):
    parts = [[(0, {"a": 1}), (16, {"c": 1, "a": 2})], [(8, {"b": 1, "a": 3})]]
    monkeypatch.setattr("apq_mmdet.calibration.replay.gather", lambda own: parts)
    assert list(layer_runs(nn.Linear(2, 2), as_calls([])).items()) == [("a", 3), ("b", 1), ("c", 1)]


class ByKeyword(nn.Module):
    """A block that gives a layer a keyword argument, which may belong to all of its units together."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=2)

    def forward(self, x):
        return self.up(x, output_size=[10, 9])


@pytest.mark.parametrize("gradients", [False, True])
def test_a_layer_that_is_given_keyword_arguments_is_not_taken_apart(gradients):
    block = ByKeyword()
    formats = dict(deconv=dict(kind="ConvTranspose2d", weight=dict(granularity="channel")))
    quantize_model(block, recipe("minmax", scope="detector", formats=formats).policy)
    x = torch.randn(5, 2, 4, 4)
    with float_only(block), torch.no_grad():
        output = block(x)
    call = to_units(block, BlockCall((x,), {}, [output], [output], 0))
    ((layer, alone),) = layer_calls(block, call, [block.up], gradients, runs=1)
    assert not alone.separable
    with float_only(block), torch.no_grad():
        assert torch.equal(layer(*alone.args, **alone.kwargs).reshape(alone.targets.shape), alone.targets)


def test_a_convolution_of_one_image_without_a_batch_axis_is_one_unit():
    """Even if it has as many channels as its input: they are no images."""
    block = nn.Sequential(nn.Conv2d(4, 4, 3))
    quantize_model(block, recipe("minmax", scope="detector").policy)
    x, found = torch.randn(4, 9, 8), []
    for args in ((x,), (x[None],)):
        with float_only(block), torch.no_grad():
            output = block(*args)
        grads = torch.linspace(-1, 3, output.numel()).view_as(output)
        call = to_units(block, BlockCall(args, {}, [output], [grads], 0))
        ((_, alone),) = layer_calls(block, call, [block[0]], gradients=True, runs=1)
        assert torch.equal(alone.args[0], args[0])
        found.append(alone)
    for alone in found:
        assert alone.targets.shape == alone.grads.shape == (1, 4 * 7 * 6)
    assert torch.equal(found[0].targets, found[1].targets)
    assert torch.equal(found[0].grads, found[1].grads)
