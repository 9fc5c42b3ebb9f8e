"""Blocks of calibration: the partition of a model, and a look at what each block sees and gives."""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.hooks import RemovableHandle

from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers.base import QuantizedLayer, quantized_layers, quantizers_of

BLOCK_CLASSES: list[type[nn.Module]] = []


def register_block(*classes: type[nn.Module]) -> None:
    """Modules of these classes (or of subclasses) are calibrated as one block each."""
    BLOCK_CLASSES.extend(classes)


def partition(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks that hold quantizers, by name; a quantized layer outside every block class is a block of its own.

    A module that has several names is known by the first.

    Raises:
        BadInputError: a quantized layer is part of two blocks, each of which would calibrate it.
    """
    blocks: dict[str, nn.Module] = {}
    seen: set[nn.Module] = set()
    owners: dict[nn.Module, str] = {}  # of quantized layers

    def walk(name: str, module: nn.Module) -> None:
        if module in seen or not quantizers_of(module):
            return
        seen.add(module)
        if isinstance(module, (QuantizedLayer, *BLOCK_CLASSES)):
            blocks[name] = module
            for layer, part in quantized_layers(module):
                owner = owners.setdefault(part, name)
                if owner != name:
                    raise BadInputError(
                        f"layer {layer!r} of block {name!r} is used in block {owner!r} too, and can be calibrated in "
                        f"one of them only: leave it float with an override"
                    )
            return
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", model)
    return blocks


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def outputs_of(tree: Any) -> list[Tensor]:
    """The outputs whose errors count: the floating-point tensors of what a block gives, not indices or masks."""
    return [tensor for tensor in tensors_of(tree) if tensor.is_floating_point()]


def bytes_of(tree: Any) -> int:
    """Size of the tensors of nested tuples, lists and dicts."""
    return sum(tensor.nbytes for tensor in tensors_of(tree))


@dataclass(frozen=True)
class BlockCall:
    """One call of a block.

    Attributes:
        args, kwargs: what the block was called with.
        outputs: see ``outputs_of``; of the float block.
        grads: importance of each output, mostly a gradient of the calibration loss (``importance.py``); same shapes.
            None where nothing asks for it.
        image: index of the image.
        float_inputs: those of the float model, where ``args`` and ``kwargs`` are what quantized blocks give; else None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    grads: list[Tensor] | None
    image: int
    float_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None


class SeenEnough(Exception):
    """Raised by a hook where the rest of a forward is of no interest."""


@contextlib.contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Context at the end of which the hooks are removed."""
    with contextlib.ExitStack() as stack:
        for hook in hooks:
            stack.enter_context(hook)
        yield


@contextlib.contextmanager
def watch_blocks(
    blocks: dict[str, nn.Module], see: Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]
) -> Iterator[None]:
    """Call ``see(name, args, kwargs, output)`` after each block's forward; a returned value replaces the output.

    The forward of a block raises CalibrationError where it changes a tensor that it was given, because what ``see`` is
    told would not be what the block had been called with.
    """
    given: dict[str, list[tuple[Tensor, int | Tensor]]] = {}

    def before(name: str, _: nn.Module, args: tuple, kwargs: dict) -> None:
        given[name] = [(tensor, _state(tensor)) for tensor in tensors_of((args, kwargs))]

    def after(name: str, _: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        if any(_is_changed(tensor, state) for tensor, state in given.pop(name)):
            raise CalibrationError(f"block {name!r} changes its input in place; let it work on a copy (inplace=False)")
        return see(name, args, kwargs, output)

    hooks = [block.register_forward_pre_hook(partial(before, name), with_kwargs=True) for name, block in blocks.items()]
    hooks += [block.register_forward_hook(partial(after, name), with_kwargs=True) for name, block in blocks.items()]
    with hooked(hooks):
        yield


def _state(tensor: Tensor) -> int | Tensor:
    """How often a tensor has been changed in place; a copy of one of inference mode, which does not say."""
    return tensor.clone() if tensor.is_inference() else tensor._version


def _is_changed(tensor: Tensor, before: int | Tensor) -> bool:
    if isinstance(before, int):
        return tensor._version != before
    return not torch.allclose(tensor, before, rtol=0, atol=0, equal_nan=True)
