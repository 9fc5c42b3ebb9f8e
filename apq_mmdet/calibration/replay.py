"""What a block's calibration needs besides its outputs: weights that stay, the order and the calls of its layers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import hooked, tensors_of
from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.units import UnitCall, UnitCalls, rows_of
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers
from apq_mmdet.quantizers import Quantizer, QuantizerMode


@contextlib.contextmanager
def fixed_weights(block: nn.Module, target: QuantizedLayer, role: str) -> Iterator[None]:
    """Context in which every quantized weight but the searched one is quantized once, not in each replay."""
    fixed: list[Quantizer] = []
    try:
        for _, layer in quantized_layers(block):
            if "weight" not in layer.quantizers or (layer is target and role == "weight"):
                continue
            quantizer = layer.quantizers["weight"]
            if quantizer.mode is not QuantizerMode.FLOAT:
                quantizer.fixed = quantizer(layer.weight)
                fixed.append(quantizer)
        yield
    finally:
        for quantizer in fixed:
            quantizer.fixed = None


def execution_order(block: nn.Module, calls: UnitCalls) -> list[str]:
    """Names of the quantized layers that run in the first calls of all kinds of all processes, in their order."""
    ran: list[str] = []
    seen: list[tuple[int, str]] = []  # (image, layer)
    hooks = (
        layer.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
        for name, layer in quantized_layers(block)
    )
    with hooked(hooks), float_only(block):
        for call in calls.kinds():
            ran.clear()
            block(*call.args, **call.kwargs)
            seen += ((call.image, name) for name in ran)
    # in the order of the images, not of the processes
    merged = sorted((pair for part in gather(seen) for pair in part), key=lambda pair: pair[0])
    return list(dict.fromkeys(name for _, name in merged))


def layer_calls(
    block: nn.Module, call: UnitCall, wanted: list[QuantizedLayer]
) -> list[tuple[QuantizedLayer, UnitCall]]:
    """Inputs, outputs and output gradients of quantized layers in one call of their block, run in float.

    The gradient at a layer's output is the block output's gradient pulled back through the float block, so only
    block-level tensors ever have to be captured.
    """
    seen: list[tuple[QuantizedLayer, tuple[Any, ...], dict[str, Any], Tensor]] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        output = output if output.requires_grad else output.requires_grad_()
        seen.append((module, args, kwargs, output))
        return output.clone()  # what follows may modify it in place

    hooks = (layer.register_forward_hook(hook, with_kwargs=True) for layer in wanted)
    with hooked(hooks), torch.enable_grad(), float_only(block), _constant_parameters(block):
        output = rows_of(tensors_of(block(*call.args, **call.kwargs)), len(call.targets))
    if not seen or not output.requires_grad:  # none of them ran, or none of those that ran has a say in the output
        return []
    outputs = [layer_output for *_, layer_output in seen]
    grads = torch.autograd.grad(output, outputs, grad_outputs=call.grads, allow_unused=True)
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
    inputs = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    if layer.kind == "Linear":
        inputs = tuple(x.reshape(-1, x.shape[-1]) for x in inputs)
        units = len(inputs[0])
    else:
        units = len(output)
    targets = output.reshape(units, -1)
    grads = torch.zeros_like(targets) if grad is None else grad.reshape(units, -1)
    padding = torch.zeros(units, dtype=torch.int64, device=output.device)
    separable = not kwargs and all(isinstance(a, Tensor) and len(a) == units for a in inputs)
    call = UnitCall(inputs, kwargs, targets, grads, padding, image, targets.numel(), separable)
    return call.by_importance() if separable else call


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
