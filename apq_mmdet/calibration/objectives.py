"""Objectives: how wrong a call's output is, as one number. Lower is better; all are sums over elements."""

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apq_mmdet.registry import OBJECTIVES

CRITERIA = ("error", "gradient", "weighted")


class Objective(ABC):
    """Error of an output against its float value.

    Bottom elimination (APQ-ViT, reconstruction): of a call's elements the share ``eliminate`` that ranks lowest
    by ``eliminate_by`` is left out, so that the search spends its freedom on the errors that matter. Elements
    that tie with the threshold stay in.

    Args:
        eliminate: share p in 0..1 of the elements to leave out.
        eliminate_by: rank by |e| ('error'), |g| ('gradient') or |g e| ('weighted').

    Attributes:
        uses_gradients: whether the cost is weighed by gradients, so that elements of small gradient cost little. A
            cost that is not is given none.
    """

    uses_gradients = True

    def __init__(self, eliminate: float = 0.0, eliminate_by: str = "error") -> None:
        if not 0.0 <= eliminate < 1.0:
            raise ValueError(f"eliminate must be at least 0 and below 1, got {eliminate!r}")
        if eliminate_by not in CRITERIA:
            raise ValueError(f"eliminate_by must be one of {', '.join(CRITERIA)}, got {eliminate_by!r}")
        self.eliminate = eliminate
        self.eliminate_by = eliminate_by

    def __call__(self, error: Tensor, grad: Tensor | None, target: Tensor, dropped: int) -> Tensor:
        """Sum of the cost of all but the ``dropped`` elements of lowest rank, a float64 scalar.

        Given some elements of a call alone, but the number dropped from all of them, the result is no more than that
        of the whole call: the dropped elements are at worst all among those given.

        Args:
            error, grad, target: [units, elements]; the output is ``target + error``, and the error may be overwritten.
                No gradient where ``needs_gradients`` is False.
            dropped: how many elements are left out; all if there are no more.
        """
        if dropped >= error.numel():
            return torch.zeros((), dtype=torch.float64, device=error.device)
        if dropped:
            error = self._without_dropped(error, grad, dropped)
        # a unit's sum in float32, which is pairwise: torch sums millions of elements in float64 far more slowly
        return self.cost(error, grad, target).sum(-1).sum(dtype=torch.float64)

    def _without_dropped(self, error: Tensor, grad: Tensor | None, dropped: int) -> Tensor:
        """The error with zeros where an element is left out, [units, elements]."""
        if self.eliminate_by == "error" and error.device.type == "cpu":  # one pass, much faster than a mask
            below = np.nextafter(order_statistic(error.abs(), dropped).numpy(), np.float32(0))
            return F.hardshrink(error, float(below))  # zero where |e| <= below
        rank = error if self.eliminate_by == "error" else grad if self.eliminate_by == "gradient" else grad * error
        rank = rank.abs()
        return error * (rank >= order_statistic(rank, dropped))

    @property
    def needs_gradients(self) -> bool:
        """Whether it looks at gradients at all."""
        return self.uses_gradients or bool(self.eliminate and self.eliminate_by != "error")

    @abstractmethod
    def cost(self, error: Tensor, grad: Tensor | None, target: Tensor) -> Tensor:
        """Non-negative cost of each element, in place of the error; all [units, elements]. Of whole units: [units, 1].

        Zero where the error is zero, which is how elements are left out.
        """


def build_objective(config: dict[str, Any]) -> Objective:
    """An objective from ``dict(type=, eliminate=, eliminate_by=)``.

    Raises:
        ValueError, TypeError: unknown type, key or value.
    """
    config = dict(config)
    name = config.pop("type", None)
    cls = OBJECTIVES.module_dict.get(name)
    if cls is None:
        raise ValueError(f"unknown type {name!r}; known: {', '.join(OBJECTIVES.module_dict)}")
    return cls(**config)


def order_statistic(values: Tensor, index: int) -> Tensor:
    """The ``index``-th smallest (from 0) of the values of any shape -> a scalar."""
    if values.device.type == "cpu":  # numpy's selection is eight times as fast as torch's on a CPU
        return torch.from_numpy(np.partition(values.numpy(), index, axis=None)[index : index + 1])[0]
    return by_sorting(values, index)


def by_sorting(values: Tensor, index: int) -> Tensor:
    """``order_statistic`` on a GPU, where torch's own selection looks at one long row with few threads."""
    return values.flatten().sort().values[index]


@OBJECTIVES.register_module(name="hessian")
class HessianObjective(Objective):
    """``(g e)^2``: the diagonal Fisher approximation of the loss increase (PTQ4ViT, ECCV 2022)."""

    def cost(self, error: Tensor, grad: Tensor | None, target: Tensor) -> Tensor:
        """See the base class."""
        return error.mul_(grad).square_()


@OBJECTIVES.register_module(name="mse")
class SquaredErrorObjective(Objective):
    """``e^2``."""

    uses_gradients = False

    def cost(self, error: Tensor, grad: Tensor | None, target: Tensor) -> Tensor:
        """See the base class."""
        return error.square_()


@OBJECTIVES.register_module(name="cosine")
class CosineObjective(Objective):
    """``1 - cos(output, target)`` of each unit (Base-PTQ in PTQ4ViT, ECCV 2022): a token of a linear, a window, a RoI.

    Raises:
        ValueError: elements are to be eliminated, of which a direction knows nothing.
    """

    uses_gradients = False

    def __init__(self, eliminate: float = 0.0, eliminate_by: str = "error") -> None:
        super().__init__(eliminate, eliminate_by)
        if eliminate:
            raise ValueError(f"the cosine compares whole units: eliminate must be 0, got {eliminate!r}")

    def cost(self, error: Tensor, grad: Tensor | None, target: Tensor) -> Tensor:
        """See the base class."""
        # half the square between directions: 1 - cos itself would be little but what float32 rounds off 1
        output = target + error
        apart = F.normalize(output, dim=1).sub_(F.normalize(target, dim=1))
        one_is_zero = output.any(1, keepdim=True) != target.any(1, keepdim=True)  # which is at a right angle to all
        return apart.square_().sum(1, keepdim=True).div_(2).masked_fill_(one_is_zero, 1.0)
