"""What a block's calibration needs besides its outputs: weights that stay, the runs and the calls of its layers."""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from apq_mmdet.calibration.blocks import SeenEnough, hooked, outputs_of
from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.units import UnitCall, UnitCalls, rows_of
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers
from apq_mmdet.quantizers import Quantizer, QuantizerMode


@contextlib.contextmanager
def fixed_weights(block: nn.Module, but: Quantizer | None = None) -> Iterator[None]:
    """Context in which every quantized weight, but that of one quantizer, is quantized once and not in each call."""
    fixed: list[Quantizer] = []
    try:
        for _, layer in quantized_layers(block):
            if "weight" not in layer.quantizers:
                continue
            quantizer = layer.quantizers["weight"]
            if quantizer is not but and quantizer.mode is not QuantizerMode.FLOAT:
                quantizer.fixed = quantizer(layer.weight)
                fixed.append(quantizer)
        yield
    finally:
        for quantizer in fixed:
            quantizer.fixed = None


def layer_runs(block: nn.Module, calls: UnitCalls) -> dict[str, int]:
    """The quantized layers that run in any call of any process, in their order.

    Returns:
        By name, how often a layer runs in one of these calls at most.
    """
    ran: list[str] = []
    seen: list[tuple[int, dict[str, int]]] = []  # (image, runs by layer)
    hooks = (
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, layer in quantized_layers(block)
    )
    with hooked(hooks), float_only(block):
        for call in calls:  # which layers run may depend on what a call is given
            ran.clear()
            block(*call.args, **call.kwargs)
            seen.append((call.image, dict(Counter(ran))))
    runs: dict[str, int] = {}
    # in the order of the images, not of the processes
    for _, counts in sorted((pair for part in gather(seen) for pair in part), key=lambda pair: pair[0]):
        runs |= {name: max(number, runs.get(name, 0)) for name, number in counts.items()}
    return runs


def layer_calls(
    block: nn.Module, call: UnitCall, wanted: list[QuantizedLayer], gradients: bool, runs: int
) -> list[tuple[QuantizedLayer, UnitCall]]:
    """Inputs and outputs of quantized layers in one call of their block, run in float.

    Args:
        gradients: whether those at the layers' outputs are wanted, too. They are the block output's gradient pulled
            back through the float block, so only block-level tensors ever have to be captured.
        runs: how often all of these layers run at most; without gradients, the block runs no further than that.
    """
    seen: list[tuple[QuantizedLayer, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        output = output.requires_grad_() if gradients and not output.requires_grad else output
        given = tree_map_only(Tensor, lambda t: t.detach().clone(), (args, kwargs))
        seen.append((module, *given, output))
        if len(seen) == runs and not gradients:
            raise SeenEnough
        return output.clone()  # what follows may modify it in place, as it may what the layer was given

    hooks = (layer.register_forward_hook(hook, with_kwargs=True) for layer in wanted)
    output = None
    with (
        contextlib.suppress(SeenEnough),
        hooked(hooks),
        torch.set_grad_enabled(gradients),
        float_only(block),
        _constant_parameters(block),
    ):
        output = rows_of(outputs_of(block(*call.args, **call.kwargs)), len(call.targets))
    outputs = [layer_output for *_, layer_output in seen]
    grads: tuple[Tensor | None, ...] = (None,) * len(outputs)
    if gradients:
        if not seen or not output.requires_grad:  # none of them ran, or none that ran has a say in the output
            return []
        found = torch.autograd.grad(output, outputs, grad_outputs=call.grads, allow_unused=True)
        grads = tuple(torch.zeros_like(t) if g is None else g for t, g in zip(outputs, found, strict=True))
    return [
        (layer, _layer_call(layer, args, kwargs, output.detach(), grad, call.image))
        for (layer, args, kwargs, output), grad in zip(seen, grads, strict=True)
    ]


def _layer_call(
    layer: QuantizedLayer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Tensor,
    grad: Tensor | None,
    image: int,
) -> UnitCall:
    """A layer's units are the entries of the first axis, for a Linear the tokens of all axes."""
    one_image = layer.kind.startswith("Conv") and output.dim() == 3  # without an axis for more
    inputs = args
    if layer.kind == "Linear":
        inputs = tuple(x.reshape(-1, x.shape[-1]) for x in inputs)
        units = len(inputs[0])
    else:
        units = 1 if one_image else len(output)
    targets, grads = (None if t is None else t.reshape(units, -1) for t in (output, grad))
    padding = torch.zeros(units, dtype=torch.int64, device=output.device)
    whole = one_image or bool(kwargs)
    separable = not whole and all(isinstance(a, Tensor) and len(a) == units for a in inputs)
    call = UnitCall(inputs, kwargs, targets, grads, padding, image, targets.numel(), separable)
    return call.by_importance() if separable and grads is not None else call


@contextlib.contextmanager
def _constant_parameters(module: nn.Module) -> Iterator[None]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
