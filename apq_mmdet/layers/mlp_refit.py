"""MLPs that get a ReLU for their GELU and are refitted to it (APHQ-ViT, Wu et al., CVPR 2025, arXiv 2504.02508).

What a GELU gives is hard to quantize: its negative values take a sliver of the range. A ReLU gives zero there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.errors import BadInputError
from apq_mmdet.layers.base import float_only
from apq_mmdet.registry import ByClass


@dataclass(frozen=True)
class Mlp:
    """Two linear layers with an activation between them, that of ``holder`` under the name ``activation``."""

    first: nn.Linear
    second: nn.Linear
    holder: nn.Module
    activation: str


class ReplacedActivation(nn.Module):
    """A ReLU in the place of a GELU, which it can give back while the float model is looked at.

    Attributes:
        original: the GELU.
        replaced: whether it is a ReLU, as it is whenever nothing else is said.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original
        self.replaced = True

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return F.relu(x) if self.replaced else self.original(x)


MLPS = ByClass()  # class of an MLP -> MLP -> Mlp, or None where it computes something else


def mlps_of(model: nn.Module) -> Iterator[tuple[str, Mlp]]:
    """(name, MLP) of every MLP inside ``model`` whose class is registered."""
    for name, module in model.named_modules():
        find = MLPS.find(module)
        mlp = None if find is None else find(module)
        if mlp is not None:
            yield name, mlp


def replace_activations(model: nn.Module) -> None:
    """Give every MLP of ``model`` a ReLU for its GELU.

    Raises:
        BadInputError: there is no MLP with a GELU.
    """
    found = [mlp for _, mlp in mlps_of(model) if isinstance(getattr(mlp.holder, mlp.activation), nn.GELU)]
    if not found:
        known = ", ".join(cls.__name__ for cls in MLPS)
        raise BadInputError(f"quant.mlp_refit: the model has no MLP with a GELU of a class that it fits ({known})")
    for mlp in found:
        setattr(mlp.holder, mlp.activation, ReplacedActivation(getattr(mlp.holder, mlp.activation)))


def replaced_activation(mlp: Mlp) -> ReplacedActivation | None:
    """The activation of an MLP if it is a replaced one."""
    activation = getattr(mlp.holder, mlp.activation)
    return activation if isinstance(activation, ReplacedActivation) else None


@contextmanager
def original_function(model: nn.Module) -> Iterator[None]:
    """Context in which a model, not calibrated yet, computes what the float model does of which it was made.

    No quantizer acts, as in ``float_only``, and replaced activations are what they were.
    """
    activations = [module for module in model.modules() if isinstance(module, ReplacedActivation)]
    try:
        for activation in activations:
            activation.replaced = False
        with float_only(model):
            yield
    finally:
        for activation in activations:
            activation.replaced = True
