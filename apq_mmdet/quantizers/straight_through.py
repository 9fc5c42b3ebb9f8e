"""The straight-through estimator, by which what rounds can be trained."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, inside: Tensor) -> Tensor:
        ctx.save_for_backward(inside)
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad * inside, None, None


def straight_through(
    x: Tensor, codes: Tensor, clip: Callable[[Tensor], Tensor], value: Callable[[Tensor], Tensor]
) -> Tensor:
    """``value(clip(codes))``; its gradient is that of ``x`` where clipping leaves a code as it is, and zero elsewhere.

    Args:
        x: what is quantized.
        codes: of ``x``, whole floats before clipping, in its shape; made without a gradient, and written over.
        clip, value: codes to codes and codes to values; they may write over what they are given.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value(clip(codes))
    clipped = clip(codes.clone())
    # as floats: a CPU takes five times as long to multiply a gradient by booleans, though these are smaller
    inside = codes.eq_(clipped)
    return _StraightThrough.apply(x, value(clipped), inside)
