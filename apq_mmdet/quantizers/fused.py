"""Pointwise formulas as one kernel, for the inner loop of a search on a GPU."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SAME_BITS = {"eager_numerics.division_rounding": True}  # quotients on a GPU are rounded as without a compiler


class Fused:
    """A pointwise function of tensors that torch compiles to one kernel where that pays, and runs as written elsewhere.

    On a GPU each operator of a formula is a pass over its memory. On a CPU the operands of a search stay in the cache,
    and compiling would take longer than it spares. A compiler that is missing or fails is warned of once, and then
    the function runs as written. So does it, beside what is compiled, for operands that are laid out unlike the first
    few kinds (torch's limit of recompilations, eight by default).

    Args:
        function: what to compute; no side effects.
        devices: types of device on which it is compiled.
    """

    def __init__(self, function: Callable[..., Tensor], devices: tuple[str, ...] = ("cuda",)) -> None:
        self.function = function
        self.devices = devices
        self._compiled: Callable[..., Tensor] | None = None
        self._failed = False

    def __call__(self, x: Tensor, *others: Any) -> Tensor:
        """The function's value; the device of the first operand decides how it is computed."""
        if self._failed or x.device.type not in self.devices:
            return self.function(x, *others)
        try:
            if self._compiled is None:
                self._compiled = torch.compile(self.function, dynamic=True, options=SAME_BITS)
            return self._compiled(x, *others)
        except torch.cuda.OutOfMemoryError:  # of which the plain form takes more
            raise
        except Exception as error:  # whatever the compiler or its backend raises, the plain form is right
            self._failed = True
            warnings.warn(f"not compiled, and slower for it: {type(error).__name__}: {error}", stacklevel=2)
            return self.function(x, *others)
