"""What is computed in all processes is taken from the first one, whatever the others have got."""

from collections.abc import Callable

import pytest
import torch
from helpers import as_calls, observed, recipe
from torch import Tensor, nn

from apq_mmdet.calibration.compensation import CompensationConfig, compensate
from apq_mmdet.calibration.mlp_refit import refit_mlps
from apq_mmdet.calibration.output_compensation import fit_output_compensation
from apq_mmdet.calibration.reconstruction import ReconstructionConfig, reconstruct
from apq_mmdet.calibration.units import UnitCall, UnitCalls
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers import quantize_model
from apq_mmdet.layers.output_compensation import COMPENSATED
from apq_mmdet.models.timm_import import import_timm

CHANNELS = 6


class Block(nn.Module):
    """Maps tokens to tokens of the same width."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def prepared(make: Callable[[], nn.Module], name: str, **settings: object) -> tuple[nn.Module, UnitCalls]:
    """A quantized block with ranges, and its calls on two images of 40 tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(make())
    quantize_model(model, recipe(name, w_bits=3, a_bits=3, **settings).policy)
    inputs = [torch.randn(1, 40, CHANNELS) @ torch.randn(CHANNELS, CHANNELS) for _ in range(2)]
    entries = []
    for image, (x, output) in enumerate(zip(inputs, observed(model[0], [(x,) for x in inputs]), strict=True)):
        targets, padding = output.flatten(1), torch.zeros(1, dtype=torch.int64)
        entries.append(UnitCall((x,), {}, targets, torch.ones_like(targets), padding, image, targets.numel(), True))
    return model[0], as_calls(entries)


def compensated() -> list[Tensor]:
    block, calls = prepared(Block, "minmax")
    compensate(block, calls, CompensationConfig())
    weight = block.linear.quantizers["weight"]
    return [block.linear.weight, block.linear.bias, weight.scale, weight.zero_point]


def with_corrected_output() -> list[Tensor]:
    block, calls = prepared(Block, "qwt")
    fit_output_compensation(block, block, calls)
    return [block.output_compensation.weight, block.output_compensation.bias]


def refitted() -> list[Tensor]:
    def make() -> nn.Module:
        return import_timm().layers.Mlp(CHANNELS, 8)

    block, calls = prepared(make, "aphq", reconstruction=None, mlp_refit=True)
    refit_mlps(block, block, calls, seed=0)
    return [block.fc1.weight, block.fc1.bias, block.fc2.weight, block.fc2.bias]


@pytest.mark.parametrize("found", [compensated, with_corrected_output, refitted])
def test_values_are_those_of_the_first_process(found: Callable[[], list[Tensor]], monkeypatch) -> None:
    monkeypatch.setitem(COMPENSATED, Block, lambda block: CHANNELS)
    monkeypatch.setattr("apq_mmdet.calibration.mlp_refit.STEPS", 2)
    own = [tensor.detach().clone() for tensor in found()]
    told_by_the_first(lambda tensor: tensor + 1, monkeypatch)
    for tensor, here in zip(found(), own, strict=True):
        assert torch.equal(tensor, here + 1)


def test_learned_values_are_those_of_the_first_process(monkeypatch) -> None:
    config = ReconstructionConfig(iterations=100, batch=16, rounding_lr=0.02, step_lr=0.003)
    block, calls = prepared(Block, "minmax")
    assert reconstruct(block, calls, config, seed=0)["kept"]
    told = told_by_the_first(lambda tensor: tensor * torch.nan, monkeypatch)
    block, calls = prepared(Block, "minmax")
    with pytest.raises(CalibrationError, match="NaN"):
        reconstruct(block, calls, config, seed=0)
    assert len(told) == 2  # codes and steps


def told_by_the_first(change: Callable[[Tensor], Tensor], monkeypatch) -> list[int]:
    """Let the first process have found something else; the numbers of tensors that it was asked for."""
    told = []

    def broadcast(values: list, source: int) -> None:
        if isinstance(values[0], list):
            told.append(len(values[0]))
            values[0] = [change(tensor) for tensor in values[0]]

    monkeypatch.setattr("apq_mmdet.calibration.distributed.broadcast_object_list", broadcast)
    return told
