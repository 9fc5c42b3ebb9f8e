"""Smaller block calls: the samplers of the fast recipes."""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.recipe import SearchConfig
from apq_mmdet.calibration.units import UnitCall, seed_of, to_units
from apq_mmdet.layers.base import float_only
from apq_mmdet.registry import ByClass

# block class -> (block, call, search config, generator) -> a smaller call with matching outputs and gradients
SAMPLERS = ByClass()


def sample_call(block: nn.Module, call: BlockCall, search: SearchConfig, seed: int) -> BlockCall:
    """A smaller call of this block if the search asks for one; the choice depends on seed and image alone."""
    generator = torch.Generator().manual_seed(seed_of(seed, call.image))
    sampler = SAMPLERS.find(block)
    return call if sampler is None else sampler(block, call, search, generator)


def sampled_units(block: nn.Module, call: BlockCall, search: SearchConfig, seed: int) -> UnitCall:
    """The units of a call on which its block is judged: all, or those of the samples that the search asks for."""
    if search.windows or search.rows:
        with float_only(block):
            call = sample_call(block, call, search, seed)
    return to_units(block, call).sampled(search.tokens, seed)


def sample_rows(block: nn.Module, call: BlockCall, search: SearchConfig, generator: torch.Generator) -> BlockCall:
    """Sampler of heads whose first axis are independent RoIs: at most ``search.rows`` of them."""
    rows = call.outputs[0].shape[0]
    if not search.rows or rows <= search.rows:
        return call
    chosen = torch.randperm(rows, generator=generator)[: search.rows].sort().values

    def pick(t: Tensor) -> Tensor:
        return t[chosen.to(t.device)]

    args, kwargs, outputs, grads, floats = tree_map_only(
        Tensor, pick, [call.args, call.kwargs, call.outputs, call.grads, call.float_inputs]
    )
    return replace(call, args=tuple(args), kwargs=kwargs, outputs=outputs, grads=grads, float_inputs=floats)
