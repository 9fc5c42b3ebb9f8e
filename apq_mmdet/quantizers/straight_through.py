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


def straight_through(x: Tensor, values: Tensor, inside: Tensor) -> Tensor:
    """``values``, whose gradient is that of ``x`` where ``inside`` and zero elsewhere; all of one shape."""
    return _StraightThrough.apply(x, values, inside)
