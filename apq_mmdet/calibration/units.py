"""Units: the parts of a block call that do not see each other, such as windows, patches and RoIs.

A search looks at a call as a stack of its units, the most important ones first. Tiles of units stay in the cache, and
the first units alone tell most of the bad candidates.
"""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.distributed import SHARD, gather
from apq_mmdet.calibration.store import TensorStore
from apq_mmdet.registry import ByClass

SCREENS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)  # shares of a call's units on which candidates can be screened
TILE_ELEMENTS = 2**19  # of one tile's output: what a block makes of it stays in a core's share of the cache


@dataclass(frozen=True)
class Parts:
    """The independent units of one block call.

    Attributes:
        args: inputs of the units; every tensor has the units on axis 0.
        to_units: takes an output of the block, or a gradient of one, to [units, ...].
        padding: int64 [units], output elements of each unit that stand for nothing; None where there are none.
        tokens: of a unit, by which a sample's size is reckoned; patches and RoIs count as one.
    """

    args: tuple[Any, ...]
    to_units: Callable[[Tensor], Tensor]
    padding: Tensor | None = None
    tokens: int = 1


@dataclass(frozen=True)
class View:
    """How the calls of a block are taken apart.

    Attributes:
        module: maps the units' inputs to their outputs; shares the block's submodules and their names.
        parts: the units of a call, from the arguments of the block's ``forward``.
    """

    module: nn.Module
    parts: Callable[..., Parts]


# block class -> block -> its view, or None where its calls cannot be taken apart
VIEWS = ByClass()


@dataclass(frozen=True)
class UnitCall:
    """One call of a block as a stack of U units, the most important ones first; or as one unit, the whole call.

    Attributes:
        args, kwargs: inputs; where ``separable``, every tensor has the units on axis 0.
        targets: float outputs, [U, elements of a unit].
        grads: their gradients, or None where nothing asks for them.
        padding: int64 [U], elements of each unit that stand for nothing: zero in outputs, targets and gradients.
        image: the image's index.
        elements: number of output elements of the whole call without padding, also where only some units are held.
        separable: whether units can be judged apart.
        tokens: of a unit: those of a window; a patch or a RoI counts as one.
        float_inputs: (args, kwargs) of the float model, where the inputs are what quantized blocks give; else None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Tensor
    grads: Tensor | None
    padding: Tensor
    image: int
    elements: int
    separable: bool
    float_inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    tokens: int = 1

    @property
    def of_float(self) -> "UnitCall":
        """The same call with the inputs of the float model."""
        if self.float_inputs is None:
            return self
        args, kwargs = self.float_inputs
        return replace(self, args=args, kwargs=kwargs, float_inputs=None)

    @property
    def signature(self) -> str:
        """Calls of equal signature can be stacked."""
        leaves, spec = tree_flatten([self.args, self.kwargs])
        described = [t.shape[1:] if isinstance(t, Tensor) else t for t in leaves]
        return f"{self.separable} {self.targets.shape[1]} {spec} {described}"

    def units(self, start: int, stop: int) -> "UnitCall":
        """The units ``start`` to ``stop``, without a copy."""
        if not self.separable or (start == 0 and stop >= len(self.targets)):
            return self
        return self.map(lambda t: t[start:stop])

    def first(self, share: float) -> "UnitCall":
        """The most important units, a share of them and at least one."""
        return self.units(0, math.ceil(share * len(self.targets)))

    def by_importance(self) -> "UnitCall":
        """The units in descending order of their squared gradients; without gradients in a scattered order."""
        if self.grads is None:
            order = scattered(len(self.targets)).to(self.targets.device)
        else:
            order = self.grads.square().sum(1).argsort(descending=True, stable=True)
        return self.map(lambda t: t[order])

    def sampled(self, tokens: int, seed: int) -> "UnitCall":
        """A random sample of the units, of at most so many tokens but at least one unit; all of them for 0.

        It depends on seed and image alone.
        """
        number = max(1, tokens // self.tokens)
        if not tokens or not self.separable or number >= len(self.targets):
            return self
        chosen = scattered(len(self.targets), seed_of(seed, self.image))[:number].sort().values.to(self.targets.device)
        part = self.map(lambda t: t[chosen])
        return replace(part, elements=part.targets.numel() - int(part.padding.sum()))

    def map(self, function: Callable[[Tensor], Tensor]) -> "UnitCall":
        """Apply a function to every tensor."""
        return self.with_tensors(tree_map_only(Tensor, function, self.tensors()))

    def tensors(self) -> list[Any]:
        """Everything that holds tensors, as a tree."""
        return [self.args, self.kwargs, self.targets, self.grads, self.padding, self.float_inputs]

    def with_tensors(self, tree: list[Any]) -> "UnitCall":
        """The same call with other tensors, in the order of ``tensors``."""
        args, kwargs, targets, grads, padding, floats = tree
        return replace(
            self,
            args=args,
            kwargs=kwargs,
            targets=targets,
            grads=grads,
            padding=padding,
            float_inputs=floats,
        )


def scattered(number: int, seed: int = 0) -> Tensor:
    """A random order of so many units, int64: any part of it is a sample of them."""
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed))


def seed_of(seed: int, image: int) -> int:
    """That of the samplers of one image."""
    return seed * 1_000_003 + image


def rows_of(outputs: list[Tensor], units: int) -> Tensor:
    """Outputs of a module as [units, elements]."""
    rows = [o.reshape(1, -1) if units == 1 else o[:, None] if o.dim() == 1 else o.flatten(1) for o in outputs]
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _view(block: nn.Module) -> View | None:
    make = VIEWS.find(block)
    return None if make is None else make(block)


def unit_module(block: nn.Module) -> nn.Module:
    """What maps the inputs of a block's units to their outputs: the block itself where it has no units."""
    view = _view(block)
    return block if view is None else view.module


def to_units(block: nn.Module, call: BlockCall) -> UnitCall:
    """Take a call apart, if its block's class says how; else the whole call is one unit."""
    view = _view(block)
    if view is None:
        targets, grads = (_rows(whole, 1) for whole in (call.outputs, call.grads))
        padding = torch.zeros(1, dtype=torch.int64, device=targets.device)
        elements, floats = targets.numel(), call.float_inputs
        return UnitCall(call.args, call.kwargs, targets, grads, padding, call.image, elements, False, floats)
    parts = view.parts(*call.args, **call.kwargs)
    number = next(len(t) for t in tree_flatten(parts.args)[0] if isinstance(t, Tensor))
    targets, grads = (_rows(whole, number, parts.to_units) for whole in (call.outputs, call.grads))
    padding = torch.zeros(number, dtype=torch.int64, device=targets.device) if parts.padding is None else parts.padding
    elements = targets.numel() - int(padding.sum())
    floats = None
    if call.float_inputs is not None:
        args, kwargs = call.float_inputs
        floats = view.parts(*args, **kwargs).args, {}
    units = UnitCall(parts.args, {}, targets, grads, padding, call.image, elements, True, floats, parts.tokens)
    return units.by_importance()


def _rows(whole: list[Tensor] | None, number: int, to_units: Callable[[Tensor], Tensor] = lambda t: t) -> Tensor | None:
    return None if whole is None else rows_of([to_units(t) for t in whole], number)


class UnitCalls:
    """The calls of one block on this process' images, in order; their tensors live in a store.

    Args:
        store: keeps them.
        key: of this block in the store.
    """

    def __init__(self, store: TensorStore, key: Hashable) -> None:
        self._store, self._key = store, key
        self._calls: list[UnitCall] = []  # without tensors
        self._energies: list[list[float]] = []  # of the first units: those of each share of SCREENS, and all
        self._sizes: list[int] = []

    def add(self, call: UnitCall) -> None:
        """Append a call; one without output elements (no RoIs) says nothing and is left out."""
        if not call.targets.numel():
            return
        self._store.put((self._key, len(self._calls)), call.tensors())
        self._energies.append(_energies(call))
        self._sizes.append(call.targets.nbytes)
        empty = torch.empty(0)
        self._calls.append(call.with_tensors([(), {}, empty, None, empty, None]))

    def __len__(self) -> int:
        return len(self._calls)

    def __getitem__(self, index: int) -> UnitCall:
        return self._calls[index].with_tensors(self._store.get((self._key, index)))

    def __iter__(self) -> Iterator[UnitCall]:
        return (self[index] for index in range(len(self)))

    def has_room_for(self, part: int) -> bool:
        """Whether their store may take so many bytes for the first call, and as much for the others by their size."""
        return not self._sizes or part * self.bytes <= self._store.room * self._sizes[0]

    @property
    def bytes(self) -> int:
        """Size of all targets."""
        return sum(self._sizes)

    def most_important(self, share: float) -> Iterator[UnitCall]:
        """All calls whose units can be judged apart, and a share of the others: those of largest gradient."""
        left_out = self._unimportant(share)
        return (self[index] for index in range(len(self)) if index not in left_out)

    def masses(self) -> dict[float, float]:
        """Part of all squared gradients that ``most_important`` and ``UnitCall.first`` have, by share of SCREENS."""
        shares = (*SCREENS, 1.0)
        own = []
        for position, share in enumerate(shares):
            left_out = self._unimportant(share)
            own.append(sum(e[position] for index, e in enumerate(self._energies) if index not in left_out))
        *kept, total = (sum(part) for part in zip(*gather(own), strict=True))
        return {share: mass / total if total else 0.0 for share, mass in zip(SCREENS, kept, strict=True)}

    def _unimportant(self, share: float) -> set[int]:
        whole = [index for index, call in enumerate(self._calls) if not call.separable]
        whole.sort(key=lambda index: -self._energies[index][-1])
        return set(whole[math.ceil(share * len(whole)) :])

    def of_layer(self, index: int) -> "UnitCalls":
        """An empty list in the same store, for the calls of one of the block's layers."""
        return UnitCalls(self._store, (self._key, index))

    def drop(self) -> None:
        """Take all calls out of the store."""
        for index in range(len(self)):
            self._store.drop((self._key, index))


def _energies(call: UnitCall) -> list[float]:
    """Sum of squared gradients of the first units, those of each share of SCREENS and all; without any, their number.

    Calls whose units cannot be judged apart are looked at whole or not at all.
    """
    alike = torch.ones(len(call.targets), dtype=torch.float64)
    energies = alike if call.grads is None else call.grads.square().sum(1, dtype=torch.float64)
    sums = energies.cpu().cumsum(0)  # which has no deterministic form on a GPU
    last = [math.ceil(share * len(sums)) - 1 if call.separable else -1 for share in (*SCREENS, 1.0)]
    return sums[last].tolist()


@dataclass(frozen=True)
class Batch:
    """Calls that are evaluated together; call i takes ``lengths[i]`` units of the stack."""

    stacked: UnitCall
    lengths: tuple[int, ...]
    calls: tuple[UnitCall, ...]

    def tiles(self) -> Iterator[tuple[int, int, UnitCall]]:
        """(start, stop, units) of pieces that stay in the cache."""
        total, elements = self.stacked.targets.shape
        step = max(1, TILE_ELEMENTS // max(1, elements)) if self.stacked.separable else total
        for start in range(0, total, step):
            stop = min(start + step, total)
            yield start, stop, self.stacked.units(start, stop)


def batches(calls: Iterable[UnitCall]) -> Iterator[Batch]:
    """Stack small calls of the images of a shard; big calls stay alone.

    What is stacked depends on the images alone, not on how they are spread over processes.
    """
    groups: dict[str, list[UnitCall]] = {}  # of one shard, by signature
    shard = -1
    for call in calls:
        if call.image // SHARD != shard:
            yield from map(_stack, groups.values())
            groups, shard = {}, call.image // SHARD
        if not call.separable or call.targets.numel() > TILE_ELEMENTS:
            yield _stack([call])
            continue
        group = groups.setdefault(call.signature, [])
        if sum(c.targets.numel() for c in (*group, call)) > TILE_ELEMENTS:
            yield _stack(group)
            group.clear()
        group.append(call)
    yield from map(_stack, groups.values())


def shards(calls: Iterable[UnitCall]) -> Iterator[tuple[int, Iterator[Batch]]]:
    """The number of each shard and its ``batches``, for ``by_shard``."""
    return groupby(batches(calls), key=lambda batch: batch.calls[0].image // SHARD)


def _stack(calls: list[UnitCall]) -> Batch:
    lengths = tuple(len(call.targets) for call in calls)
    return Batch(stacked(calls), lengths, tuple(calls))


def stacked(calls: list[UnitCall]) -> UnitCall:
    """The units of separable calls of one signature as one call."""
    if len(calls) == 1:
        return calls[0]
    trees = [tree_flatten(call.tensors()) for call in calls]
    columns = zip(*(leaves for leaves, _ in trees), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    return calls[0].with_tensors(tree_unflatten(leaves, trees[0][1]))
