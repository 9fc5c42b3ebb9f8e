"""A linear correction of a block's output, ``y = y_q + W x_q + b`` (QwT, Fu et al., CVPR 2025, arXiv 2411.13918)."""

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.errors import BadInputError
from apq_mmdet.layers.base import quantizers_of
from apq_mmdet.quantizers import QuantizerMode
from apq_mmdet.registry import ByClass

NAME = "output_compensation"  # of the module inside its block

# block class -> block -> number C of its channels where it maps [..., C] to the same shape; None: leave it alone
COMPENSATED = ByClass()


class OutputCompensation(nn.Module):
    """``W x + b`` of a block's input x [..., C], in float; zero until calibration has fitted it.

    It costs C^2 multiply-accumulates a token and 4 (C^2 + C) bytes.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, channels), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return F.linear(x, self.weight, self.bias)


def install_output_compensation(model: nn.Module) -> None:
    """Give all blocks of ``model`` whose class is registered a compensation, which acts whenever they quantize.

    Raises:
        BadInputError: there is no such block.
    """
    found = False
    for module in list(model.modules()):
        count = COMPENSATED.find(module)
        channels = None if count is None else count(module)
        if channels is not None:
            like = next(module.parameters())
            module.add_module(NAME, OutputCompensation(channels).to(like.device, like.dtype))
            module.register_forward_hook(_compensated, with_kwargs=True)
            found = True
    if not found:
        known = ", ".join(cls.__name__ for cls in COMPENSATED)
        raise BadInputError(f"quant.output_compensation: the model has no block of a class that it fits ({known})")


def _compensated(block: nn.Module, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor:
    modes = (q.mode for q in quantizers_of(block))
    if all(mode in (QuantizerMode.FLOAT, QuantizerMode.OBSERVE) for mode in modes):
        return output  # a float block has nothing to be compensated
    return output + getattr(block, NAME)(input_of(block, args, kwargs))


def input_of(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """What a block's first parameter is given, by position or by keyword."""
    if args:
        return args[0]
    _, first, *_ = inspect.signature(type(block).forward).bind(block, **kwargs).arguments.values()
    return first
