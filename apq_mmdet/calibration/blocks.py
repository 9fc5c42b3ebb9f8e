"""Blocks of calibration: the partition of a model, and the capture of what each block sees and gives."""

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from apq_mmdet.layers.base import QuantizedLayer, quantizers_of

BLOCK_CLASSES: list[type[nn.Module]] = []


def register_block(*classes: type[nn.Module]) -> None:
    """Modules of these classes (or of subclasses) are calibrated as one block each."""
    BLOCK_CLASSES.extend(classes)


def partition(model: nn.Module) -> dict[str, nn.Module]:
    """Blocks that hold quantizers, by name; a quantized layer outside every block class is a block of its own."""
    blocks: dict[str, nn.Module] = {}

    def walk(name: str, module: nn.Module) -> None:
        if not quantizers_of(module):
            return
        if isinstance(module, (QuantizedLayer, *BLOCK_CLASSES)):
            blocks[name] = module
            return
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)

    walk("", model)
    return blocks


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class BlockCall:
    """One call of a block, or several images' calls stacked along the first axis.

    Attributes:
        args, kwargs: what the block was called with.
        outputs: the tensors of its float output.
        grads: gradient of the calibration loss at each output, at the disturbed point; same shapes.
        images: index of each image in this call; the first axis of every output splits evenly among them.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: list[Tensor]
    grads: list[Tensor]
    images: tuple[int, ...]

    def to(self, device: torch.device) -> "BlockCall":
        """Move all tensors."""
        moved = tree_map_only(Tensor, lambda t: t.to(device), [self.args, self.kwargs, self.outputs, self.grads])
        return replace(self, args=tuple(moved[0]), kwargs=moved[1], outputs=moved[2], grads=moved[3])


class CaptureStore:
    """Captured block calls on disk, read back through memory maps: memory stays that of one block.

    Files live in a temporary folder that goes with the context.

    Args:
        parent: existing folder to make it in; None for the system's.
    """

    def __init__(self, parent: str | Path | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="apq_capture_", dir=parent)
        self._calls: dict[str, list[tuple[int, int]]] = {}

    def __enter__(self) -> "CaptureStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def blocks(self) -> list[str]:
        """Names of the captured blocks in the order of their first call."""
        return list(self._calls)

    def _path(self, block: str, image: int, index: int, part: str) -> Path:
        return Path(self._folder.name) / f"{list(self._calls).index(block)}_{image}_{index}_{part}.pt"

    def add_call(self, block: str, image: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep one float call of a block."""
        calls = self._calls.setdefault(block, [])
        index = sum(1 for i, _ in calls if i == image)
        calls.append((image, index))
        content = tree_map_only(
            Tensor, lambda t: t.detach().cpu().contiguous(), [list(args), kwargs, tensors_of(output)]
        )
        torch.save(content, self._path(block, image, index, "call"))

    def replace_input(self, block: str, image: int, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Exchange the recorded input of a call, keeping its float output."""
        path = self._path(block, image, index, "call")
        outputs = torch.load(path, weights_only=True)[2]
        content = tree_map_only(Tensor, lambda t: t.detach().cpu().contiguous(), [list(args), kwargs, outputs])
        torch.save(content, path)

    def add_grads(self, block: str, image: int, index: int, grads: list[Tensor]) -> None:
        """Keep the gradients at the outputs of one call."""
        torch.save([g.detach().cpu().contiguous() for g in grads], self._path(block, image, index, "grad"))

    def calls(self, block: str) -> Iterator[BlockCall]:
        """The captured calls of a block, image by image."""
        for image, index in self._calls[block]:
            path = self._path(block, image, index, "call")
            args, kwargs, outputs = torch.load(path, mmap=True, weights_only=True)
            grads = torch.load(self._path(block, image, index, "grad"), mmap=True, weights_only=True)
            yield BlockCall(tuple(args), kwargs, outputs, grads, (image,))


@contextlib.contextmanager
def watch_blocks(
    blocks: dict[str, nn.Module], see: Callable[[str, tuple[Any, ...], dict[str, Any], Any], Any]
) -> Iterator[None]:
    """Call ``see(name, args, kwargs, output)`` after each block's forward; a returned value replaces the output."""
    handles = []
    for name, block in blocks.items():

        def hook(_: nn.Module, args: tuple, kwargs: dict, output: Any, name: str = name) -> Any:
            return see(name, args, kwargs, output)

        handles.append(block.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
