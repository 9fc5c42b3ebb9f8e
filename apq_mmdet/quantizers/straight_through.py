"""The straight-through estimator, by which what rounds can be trained."""

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


def is_trained(x: Tensor) -> bool:
    """Whether a gradient of ``x`` will be asked for."""
    return torch.is_grad_enabled() and x.requires_grad


def unclipped(codes: Tensor, clipped: Tensor) -> Tensor:
    """1 where clipping left a code as it was and 0 elsewhere, written over ``codes``.

    As floats, because a CPU takes five times as long to multiply a gradient by booleans, though these are smaller.
    """
    return codes.eq_(clipped)


def straight_through(x: Tensor, values: Tensor, inside: Tensor) -> Tensor:
    """``values``, whose gradient is that of ``x`` times ``inside``, which is ``unclipped``; all of one shape."""
    return _StraightThrough.apply(x, values, inside)
