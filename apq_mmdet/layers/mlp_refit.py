"""MLPs that get a ReLU for their GELU and are refitted to it (APHQ-ViT, Wu et al., CVPR 2025, arXiv 2504.02508).

What a GELU gives is hard to quantize: its negative values take a sliver of the range. A ReLU gives zero there.
"""

from collections.abc import Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.errors import BadInputError
from apq_mmdet.registry import ByClass

REPLACED = "is_replaced"  # name of a buffer


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with an activation between them, that of ``holder`` under the name ``activation``."""

    first: nn.Linear
    second: nn.Linear
    holder: nn.Module
    activation: str


class ReplaceableActivation(nn.Module):
    """A GELU until calibration has refitted its MLP, a ReLU from then on; its state says which.

    Attributes:
        original: the GELU.
        is_replaced: a bool tensor.
    """

    is_replaced: Tensor

    def __init__(self, original: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.original = original
        self.register_buffer(REPLACED, torch.tensor(False, device=device))
        self._replaced = False  # forward reads no tensor, for which a GPU would have to be waited for

    def replace(self) -> None:
        """Be a ReLU from now on."""
        self._replaced = True
        self.is_replaced.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.relu(x) if self._replaced else self.original(x)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._replaced = bool(self.is_replaced)


MLPS = ByClass()  # class of an MLP -> MLP -> Mlp, or None where it computes something else


def _mlps_of(model: nn.Module) -> Iterator[tuple[str, Mlp]]:
    for name, module in model.named_modules():
        find = MLPS.find(module)
        mlp = None if find is None else find(module)
        if mlp is not None:
            yield name, mlp


def refittable_mlps(model: nn.Module, quantized: Set[nn.Module]) -> list[Mlp]:
    """The MLPs with a GELU of which both layers are going to be quantized.

    Raises:
        BadInputError: there is none.
    """
    found = [mlp for _, mlp in _mlps_of(model) if isinstance(getattr(mlp.holder, mlp.activation), nn.GELU)]
    found = [mlp for mlp in found if {mlp.first, mlp.second} <= quantized]
    if not found:
        known = ", ".join(cls.__name__ for cls in MLPS)
        raise BadInputError(
            f"quant.mlp_refit: the model has no quantized MLP with a GELU (torch.nn.GELU) of a class that it fits "
            f"({known})"
        )
    return found


def make_replaceable(mlps: list[Mlp]) -> None:
    """Let calibration put a ReLU in the place of these MLPs' activations."""
    for mlp in mlps:
        original = getattr(mlp.holder, mlp.activation)
        setattr(mlp.holder, mlp.activation, ReplaceableActivation(original, mlp.first.weight.device))


def replaceable_mlps(module: nn.Module) -> list[tuple[str, Mlp, ReplaceableActivation]]:
    """(name, MLP, activation) of those inside a module that ``make_replaceable`` was given."""
    found = [(name, mlp, getattr(mlp.holder, mlp.activation)) for name, mlp in _mlps_of(module)]
    return [entry for entry in found if isinstance(entry[2], ReplaceableActivation)]
