"""Smaller and stacked block calls: samplers of the fast recipes, and the stacking of equally shaped images."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.recipe import SearchConfig

# (block, call, search config, generator) -> a smaller call with matching outputs and gradients
Sampler = Callable[[nn.Module, BlockCall, SearchConfig, torch.Generator], BlockCall]
SAMPLERS: dict[type[nn.Module], Sampler] = {}
MAX_STACKED_ELEMENTS = 4_000_000  # of one output; about 16 MB, far from the memory of any machine


def register_sampler(*classes: type[nn.Module]) -> Callable[[Sampler], Sampler]:
    """Decorator: blocks of these classes (or of subclasses) are sampled by the decorated function."""

    def register(sampler: Sampler) -> Sampler:
        for cls in classes:
            SAMPLERS[cls] = sampler
        return sampler

    return register


def sample_call(block: nn.Module, call: BlockCall, search: SearchConfig, seed: int) -> BlockCall:
    """A smaller call of this block if the search asks for one; the choice depends on seed and image alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + call.images[0])
    for cls, sampler in SAMPLERS.items():
        if isinstance(block, cls):
            return sampler(block, call, search, generator)
    return call


def sample_rows(block: nn.Module, call: BlockCall, search: SearchConfig, generator: torch.Generator) -> BlockCall:
    """Sampler of heads whose first axis are independent RoIs: at most ``search.rows`` of them."""
    rows = call.outputs[0].shape[0]
    if not search.rows or rows <= search.rows:
        return call
    chosen = torch.randperm(rows, generator=generator)[: search.rows].sort().values

    def pick(t: Tensor) -> Tensor:
        return t[chosen.to(t.device)]

    parts = tree_map_only(Tensor, pick, [call.args, call.kwargs, call.outputs, call.grads])
    return replace(call, args=tuple(parts[0]), kwargs=parts[1], outputs=parts[2], grads=parts[3])


def stack_calls(calls: Iterable[BlockCall]) -> list[BlockCall]:
    """Stack calls whose tensors have equal shapes and whose other arguments are equal along the first axis.

    Every image keeps its own rows, so sums per image are what they would be one by one.
    """
    groups: dict[Any, list[BlockCall]] = {}
    for call in calls:
        if all(t.numel() for t in call.outputs):
            groups.setdefault(_signature(call), []).append(call)
    stacked = []
    for group in groups.values():
        most = max(1, MAX_STACKED_ELEMENTS // max(t.numel() for t in group[0].outputs))
        stacked += [_stack(group[i : i + most]) for i in range(0, len(group), most)]
    return stacked


def _signature(call: BlockCall) -> Any:
    leaves, spec = tree_flatten([call.args, call.kwargs, call.outputs])
    described = [tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
    return str(spec), str(described)


def _stack(calls: list[BlockCall]) -> BlockCall:
    if len(calls) == 1:
        return calls[0]

    flat = [tree_flatten([c.args, c.kwargs, c.outputs, c.grads]) for c in calls]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    leaves = [torch.cat(column) if isinstance(column[0], Tensor) else column[0] for column in columns]
    args, kwargs, outputs, grads = tree_unflatten(leaves, flat[0][1])
    return BlockCall(tuple(args), kwargs, outputs, grads, tuple(i for c in calls for i in c.images))
