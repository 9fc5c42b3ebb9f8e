"""Captured tensors: in memory up to a budget, beyond it on disk, read back through memory maps."""

import shutil
import tempfile
from collections.abc import Hashable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import get_world_size
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from apq_mmdet.calibration.blocks import BlockCall, bytes_of, outputs_of
from apq_mmdet.calibration.distributed import gather
from apq_mmdet.errors import CalibrationError

MOST_IN_SYSTEMS = 2**31  # bytes; the system's temporary folder may be memory
TENSOR = object()  # stands for a tensor in the structure of a kept tree


class TensorStore:
    """Nested tuples, lists and dicts of tensors by key; memory stays within a budget, whatever is put in.

    Tensors are copied when they are put in. What fits in the budget stays in memory on its device; the rest goes to
    files in a temporary folder that goes with the context, and comes back to its device.

    Args:
        parent: existing folder to make the temporary one in; None for the system's.
        memory: bytes that may stay in memory.
    """

    def __init__(self, parent: str | Path | None = None, memory: int = 0) -> None:
        # what is left of the folder is no reason to lose a calibration
        self._folder = tempfile.TemporaryDirectory(prefix="apq_capture_", dir=parent, ignore_cleanup_errors=True)
        self._is_given = parent is not None
        self._memory = memory
        self._structure: dict[Hashable, tuple[TreeSpec, list[Any], list[torch.device]]] = {}
        self._held: dict[Hashable, list[Tensor]] = {}
        self._files: dict[Hashable, Path] = {}
        self._written = 0

    def __enter__(self) -> "TensorStore":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.clear()
        self._folder.cleanup()

    @property
    def room(self) -> int:
        """Bytes that it may still take: in memory, and this process' share of half of what the disk has left."""
        try:
            free = shutil.disk_usage(self._folder.name).free // (2 * get_world_size())
        except OSError:  # what is put in next tells that the folder is gone
            free = 0
        return self._memory + (free if self._is_given else min(free, MOST_IN_SYSTEMS))

    def put(self, key: Hashable, tree: Any) -> None:
        """Keep a tree; an earlier one of the same key is replaced."""
        self.drop(key)
        leaves, spec = tree_flatten(tree)
        tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        kept = [TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self._structure[key] = (spec, kept, [tensor.device for tensor in tensors])
        size = bytes_of(tensors)
        if size <= self._memory:
            self._memory -= size
            self._held[key] = [t.clone(memory_format=torch.contiguous_format) for t in tensors]
        elif tensors:
            self._written += 1
            self._files[key] = Path(self._folder.name) / f"{self._written}.pt"
            self._write([t.cpu().clone(memory_format=torch.contiguous_format) for t in tensors], self._files[key])

    def _write(self, tensors: list[Tensor], path: Path) -> None:
        try:
            torch.save(tensors, path)
        except (OSError, RuntimeError) as error:  # torch's writer does not say that a disk is full
            where = "a folder that is gone"
            if path.parent.exists():
                where = f"a disk with {shutil.disk_usage(path.parent).free / 2**20:.0f} MiB free"
            raise CalibrationError(
                f"captured activations cannot be written to {path}, in {where} ({error}): use another folder, fewer "
                f"images, or a larger memory budget"
            ) from error

    def get(self, key: Hashable) -> Any:
        """The tree of a key; its tensors must not be modified."""
        spec, leaves, devices = self._structure[key]
        if key in self._files:
            tensors = torch.load(self._files[key], mmap=True, weights_only=True)
            tensors = [t.to(device) for t, device in zip(tensors, devices, strict=True)]
        else:
            tensors = self._held.get(key, [])
        left = iter(tensors)
        return tree_unflatten([next(left) if leaf is TENSOR else leaf for leaf in leaves], spec)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._structure

    def drop(self, key: Hashable) -> None:
        """Forget a key."""
        self._structure.pop(key, None)
        self._memory += bytes_of(self._held.pop(key, []))
        if key in self._files:
            self._files.pop(key).unlink()


def _all_before(block: str, before: dict[str, list[str]]) -> set[str]:
    """What comes before a block, and what comes before that, and so on."""
    found: set[str] = set()
    waiting = [block]
    while waiting:
        new = [first for first in before[waiting.pop()] if first not in found]
        found.update(new)
        waiting += new
    return found


class CaptureStore(TensorStore):
    """What each block sees and gives, call by call, in the order of the first calls.

    Args:
        parent, memory: see TensorStore.
    """

    def __init__(self, parent: str | Path | None = None, memory: int = 0) -> None:
        super().__init__(parent, memory)
        self._calls: dict[str, list[tuple[int, int]]] = {}
        self._sequences: dict[int, list[str]] = {}  # by image, the blocks in the order of their first call on it

    @property
    def blocks(self) -> list[str]:
        """Names of the captured blocks in the order of their first call."""
        return list(self._calls)

    def add_call(self, block: str, image: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep one float call of a block."""
        calls = self._calls.setdefault(block, [])
        index = sum(1 for i, _ in calls if i == image)
        if index == 0:
            self._sequences.setdefault(image, []).append(block)
        calls.append((image, index))
        self.put((block, image, index, "input"), (args, kwargs))
        outputs = outputs_of(output)
        if not outputs:
            raise CalibrationError(
                f"block {block!r} gives no floating-point numbers that could tell how wrong it is; leave it float with "
                f"an override"
            )
        self.put((block, image, index, "output"), outputs)

    def replace_input(self, block: str, image: int, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Exchange the recorded input of a call, keeping its float output, and the float input apart."""
        self.put((block, image, index, "float_input"), self.get((block, image, index, "input")))
        self.put((block, image, index, "input"), (args, kwargs))

    def add_grads(self, block: str, image: int, index: int, grads: list[Tensor]) -> None:
        """Keep the gradients at the outputs of one call."""
        self.put((block, image, index, "grads"), grads)

    def order(self) -> list[str]:
        """The blocks of all processes in the order of their calls, whichever process made them.

        One that runs on some images only comes before what it runs before on those; where images disagree, the first
        decides.
        """
        before: dict[str, list[str]] = {}
        for _, sequence in sorted(item for part in gather(self._sequences) for item in part.items()):
            before |= {block: [] for block in sequence if block not in before}
            for first, second in pairwise(sequence):
                if first not in before[second] and second not in _all_before(first, before):
                    before[second].append(first)
        order: dict[str, None] = {}
        while len(order) < len(before):
            left = (block for block in before if block not in order)
            order[next(block for block in left if all(first in order for first in before[block]))] = None
        return list(order)

    def number_of_calls(self, block: str, image: int) -> int:
        """How often a block was called on an image."""
        return sum(1 for i, _ in self._calls.get(block, []) if i == image)

    def take_calls(self, block: str, keep_inputs: bool = False) -> Iterator[BlockCall]:
        """The captured calls of a block in the order of the images; each is forgotten once it was taken.

        Args:
            keep_inputs: keep the inputs for ``get((block, image, index, "input"))``.
        """
        for image, index in sorted(self._calls.get(block, [])):
            args, kwargs = self.get((block, image, index, "input"))
            outputs, key = self.get((block, image, index, "output")), (block, image, index, "grads")
            grads = self.get(key) if key in self else None
            yield BlockCall(tuple(args), kwargs, outputs, grads, image, self._float_inputs(block, image, index))
            self._drop_call(block, image, index, keep_inputs)

    def inputs(self, block: str) -> Iterator[BlockCall]:
        """The captured calls of a block in the order of the images, before there are gradients; they stay captured."""
        for image, index in sorted(self._calls.get(block, [])):
            args, kwargs = self.get((block, image, index, "input"))
            yield BlockCall(tuple(args), kwargs, self.get((block, image, index, "output")), None, image)

    def drop_calls(self, block: str, keep_inputs: bool) -> None:
        """Forget the calls of a block that is not searched again."""
        for image, index in self._calls.get(block, []):
            self._drop_call(block, image, index, keep_inputs)

    def _float_inputs(self, block: str, image: int, index: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        key = (block, image, index, "float_input")
        if key not in self:
            return None
        args, kwargs = self.get(key)
        return tuple(args), kwargs

    def _drop_call(self, block: str, image: int, index: int, keep_inputs: bool) -> None:
        for part in ("output", "grads", "float_input") + (() if keep_inputs else ("input",)):
            self.drop((block, image, index, part))
