"""Replays of what a block computes behind one quantizer: what cannot change is computed once for all candidates."""

import contextlib
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from apq_mmdet.layers.integer import in_integer_precision, integer_precision
from apq_mmdet.quantizers import Quantizer

HOST_READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)  # Python may go on with what they give
# operators around a product that need no precision: switching it takes as long as they do
UNCONCERNED = tuple(getattr(torch.ops.aten, name).default for name in ("t", "view", "_unsafe_view", "expand"))
T = TypeVar("T")


@dataclass(frozen=True)
class Placeholder:
    """Stands for a tensor whose value differs by candidate."""

    index: int


@dataclass
class Step:
    """One operator, or one call of a quantizer, whose result depends on the searched quantizer.

    Attributes:
        function: what is called.
        args, kwargs: its arguments, with slots for what changes.
        outputs: slots of the tensors it gives, in order; None for other values.
        narrow: whether it runs in ``integer_precision``.
        finished: slots that nothing behind it reads.
        reads: slots among its arguments.
    """

    function: Callable[..., Any]
    args: Sequence[Any]
    kwargs: dict[str, Any]
    outputs: list[int | None]
    narrow: bool
    finished: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._places = [(place, arg.index) for place, arg in enumerate(self.args) if type(arg) is Placeholder]
        self.reads = [slot.index for slot in among(Placeholder, (self.args, self.kwargs))]
        self._nested = len(self.reads) > len(self._places)

    def run(self, values: dict[int, Tensor]) -> None:
        """Compute the outputs from the values of the slots, and forget what is finished."""
        if self._nested:
            args, kwargs = fill((self.args, self.kwargs), values)
        else:  # nearly all operators
            args, kwargs = list(self.args), self.kwargs
            for place, index in self._places:
                args[place] = values[index]
        if self.narrow:
            with integer_precision():
                output = self.function(*args, **kwargs)
        else:
            output = self.function(*args, **kwargs)
        if isinstance(output, Tensor):
            values[self.outputs[0]] = output
        else:
            values.update((s, v) for s, v in zip(self.outputs, leaves_of(output), strict=True) if s is not None)
        for slot in self.finished:
            del values[slot]


def leaves_of(tree: Any) -> list[Any]:
    """What a tree holds, flat."""
    return tree_flatten(tree)[0]


def among(kind: type[T], values: Iterable[Any]) -> list[T]:
    """What is of a kind among an operator's arguments, nothing but lists and dicts: far faster than for any tree."""
    found: list[T] = []
    for value in values:
        if isinstance(value, kind):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += among(kind, value)
        elif isinstance(value, dict):
            found += among(kind, value.values())
    return found


def fill(tree: Any, values: dict[int, Tensor]) -> Any:
    """A tree with the values of its slots."""
    return tree_map_only(Placeholder, lambda slot: values[slot.index], tree)


class Tape:
    """A block's call on one input as the operators behind one quantizer.

    Recorded while the block runs once. A block that cannot be watched, that reads a number from a tensor that changes,
    or that writes into one that does not, cannot be replayed; nor can what happens outside of torch's operators be
    seen, so that a replay has to be compared with the block.

    Args:
        module: the block.
        quantizer: the one whose parameters change.
    """

    def __init__(self, module: nn.Module, quantizer: Quantizer) -> None:
        self._module, self._quantizer = module, quantizer
        self._steps: list[Step] = []
        self._result: Any = None
        self.replayable = False

    def record(self, *args: Any, **kwargs: Any) -> Any:
        """Run the block, remember what depends on the quantizer, and return the block's output."""
        recorder = _Recorder(self._quantizer)
        try:
            with recorder.watch(self._module), recorder:
                output = self._module(*args, **kwargs)
        except NotImplementedError:  # what cannot be watched, such as sparse tensors
            return self._module(*args, **kwargs)
        self._result = recorder.with_slots(output)
        self._steps = _finish_early(recorder.steps, self._result)
        self.replayable = recorder.replayable
        return output

    def replay(self) -> Any:
        """The block's output at the quantizer's present parameters, on the recorded input; equal to the last bit."""
        values: dict[int, Tensor] = {}
        for step in self._steps:
            step.run(values)
        return fill(self._result, values)


@contextlib.contextmanager
def flushed_denormals() -> Iterator[None]:
    """Context in which this thread takes numbers below 1.2e-38 for zero.

    Attention to what a shifted window masks is about 1e-44, and CPUs take several times as long for such numbers;
    beside the others of a sum they vanish in any case. Threads of torch that are running already go on as before.
    """
    before = float(torch.tensor(1e-40) * 1.0) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


class Replays:
    """Outputs of a block for one candidate after the other, by tape where that gives the block's own bits.

    They are compared at the second candidate of the first arguments.

    Args:
        module: the block.
        quantizer: the one whose candidates are tried.
    """

    def __init__(self, module: nn.Module, quantizer: Quantizer) -> None:
        self._module, self._quantizer = module, quantizer
        self._tapes: dict[Hashable, Tape] = {}
        self._trusted: bool | None = None

    def outputs(
        self, candidates: Sequence[tuple[Tensor, ...]], key: Hashable, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[Any]:
        """The block's output on these arguments for the quantizer's parameters of each candidate.

        Args:
            candidates: what ``set_parameters`` takes.
            key: the same for the same arguments, until ``forget`` is called.
            args, kwargs: of the block.
        """
        for parameters in candidates:
            self._quantizer.set_parameters(*parameters)
            tape = self._tapes.get(key)
            if self._trusted is False or len(candidates) == 1:
                yield self._module(*args, **kwargs)
            elif tape is None:
                tape = self._tapes[key] = Tape(self._module, self._quantizer)
                output = tape.record(*args, **kwargs)
                self._trusted = self._trusted if tape.replayable else False
                yield output
            elif self._trusted is None:
                replayed = tape.replay()  # first: it could find an output of the block in memory that is free again
                output = self._module(*args, **kwargs)
                self._trusted = _same_bits(replayed, output)
                yield output
            else:
                yield tape.replay()

    def forget(self) -> None:
        """Drop the tapes, and with them what they hold of the arguments' making."""
        self._tapes = {}


def _same_bits(a: Any, b: Any) -> bool:
    pairs = zip(leaves_of(a), leaves_of(b), strict=True)
    return all(torch.equal(x, y) for x, y in pairs if isinstance(y, Tensor))


class _Recorder(TorchDispatchMode):
    """Sees every operator; keeps those that depend on the buffers of ``quantizer``."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.replayable = True
        self._quantizer = quantizer
        self._seeds = {id(buffer) for buffer in quantizer.buffers()}
        self._slots: dict[int, Placeholder] = {}  # by the id of a tensor
        self._alive: list[Tensor] = []  # while they live, nothing else gets their ids
        self._read: set[int] = set()  # storages of unchanging tensors that steps read

    @contextlib.contextmanager
    def watch(self, module: nn.Module) -> Iterator[None]:
        """Context in which a quantizer's call is one step, whatever it does with numbers inside."""
        quantizers = [m for m in module.modules() if isinstance(m, Quantizer)]
        for quantizer in quantizers:
            quantizer.__dict__["forward"] = partial(self._call, quantizer, quantizer.forward)
        try:
            yield
        finally:
            for quantizer in quantizers:
                del quantizer.__dict__["forward"]

    def _call(self, quantizer: Quantizer, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self.__exit__(None, None, None)  # a compiler refuses to work below a mode
        try:
            output = forward(x)
        finally:
            self.__enter__()
        if quantizer is self._quantizer or id(x) in self._slots:
            self._append(forward, (x,), {}, [x], output)
        return output

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operator, and keep it if it depends on what changes."""
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        tensors = among(Tensor, (args, kwargs))
        changing = any(id(t) in self._slots or id(t) in self._seeds for t in tensors)
        if func._schema.is_mutable and not self._writes_safely(func, args, kwargs, changing):
            self.replayable = False
        if changing:
            self.replayable = self.replayable and not any(tag in func.tags for tag in HOST_READS)
            self._append(func, args, kwargs, tensors, output)
        return output

    def _writes_safely(self, func: Any, args: tuple, kwargs: dict[str, Any], changing: bool) -> bool:
        """A step may write into what steps made; an operator that is no step, into what no step has read."""
        given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        written = [
            given[argument.name]
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given
        ]
        tensors = among(Tensor, written)
        if changing:
            return all(id(t) in self._slots for t in tensors)
        return not any(_storage(t) in self._read for t in tensors)

    def _append(
        self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], tensors: list[Tensor], output: Any
    ) -> None:
        self._read.update(_storage(t) for t in tensors if id(t) not in self._slots)
        args, kwargs = self._argument(args), self._argument(kwargs)
        given = [output] if isinstance(output, Tensor) else leaves_of(output)
        outputs = [self._slot(value) if isinstance(value, Tensor) else None for value in given]
        narrow = in_integer_precision() and function not in UNCONCERNED
        self.steps.append(Step(function, args, kwargs, outputs, narrow))

    def _argument(self, value: Any) -> Any:
        """An operator's argument with slots for the tensors that change."""
        if isinstance(value, (list, tuple)):
            return [self._argument(item) for item in value]
        if isinstance(value, dict):
            return {key: self._argument(item) for key, item in value.items()}
        return self._slots.get(id(value), value)

    def _slot(self, tensor: Tensor) -> int:
        if id(tensor) not in self._slots:
            self._slots[id(tensor)] = Placeholder(len(self._alive))
            self._alive.append(tensor)
        return self._slots[id(tensor)].index

    def with_slots(self, tree: Any) -> Any:
        """A tree with slots for the tensors that change."""
        return tree_map_only(Tensor, lambda t: self._slots.get(id(t), t), tree)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _finish_early(steps: list[Step], result: Any) -> list[Step]:
    """The steps, each told which slots are finished behind it."""
    needed = {leaf.index for leaf in leaves_of(result) if isinstance(leaf, Placeholder)}
    for step in reversed(steps):
        used = {*step.reads, *(slot for slot in step.outputs if slot is not None)}
        step.finished = tuple(used - needed)
        needed |= used
    return steps
