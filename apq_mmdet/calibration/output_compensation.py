"""The fit of a block's output compensation: a ridge regression of what quantization takes from its output.

QwT (Fu et al., CVPR 2025, arXiv 2411.13918): ``W, b = argmin sum |y - y_q - W x_q - b|^2`` over all tokens. With
``block_input='quantized'`` x_q is what the blocks before, already compensated, give, and y what the float model has at
that place, so a block also makes up for what was lost before it. The paper takes the float block's output on x_q
for y, and has no ridge.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import outputs_of
from apq_mmdet.calibration.distributed import by_shard, take_from_first
from apq_mmdet.calibration.units import Batch, UnitCall, UnitCalls, rows_of, shards
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers.base import quantizers_of
from apq_mmdet.layers.output_compensation import NAME, OutputCompensation, input_of
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode

DAMPING = 0.01  # of W's ridge, relative to the mean power of the input's channels


@torch.no_grad()
def fit_output_compensation(block: nn.Module, module: nn.Module, calls: UnitCalls) -> None:
    """Fit the compensation of a block that has one; others are left alone.

    Args:
        block: its quantizers are calibrated.
        module: its view of units, which does not compensate, or itself; maps tokens [..., C] to tokens.
        calls: inputs and float outputs on this process' images.

    Raises:
        CalibrationError: a sum over tokens is NaN or infinite.
    """
    compensation: OutputCompensation | None = getattr(block, NAME, None)
    if compensation is None:
        return
    compensation.weight.zero_()
    compensation.bias.zero_()

    def of_shard(group: Iterator[Batch]) -> Tensor:
        return sum(_sums(module, tile) for batch in group for _, _, tile in batch.tiles()).cpu()

    with quantizer_mode(quantizers_of(block), QuantizerMode.QUANTIZE):
        total = sum(by_shard((shard, of_shard(group)) for shard, group in shards(calls)))
    gram, mixed = total.split([len(compensation.weight) + 1, len(compensation.weight)])
    if not (gram.isfinite().all() and mixed.isfinite().all()):
        raise CalibrationError("output compensation: a block's inputs or outputs are NaN or infinite")
    power = gram.diagonal()[:-1].mean().expand(len(compensation.weight))
    ridge = gram + torch.diag(torch.cat([DAMPING * power, power.new_zeros(1)]))  # the bias has none
    solution = mixed @ torch.linalg.pinv(ridge, hermitian=True)  # [C, C + 1]
    compensation.weight.copy_(solution[:, :-1])
    compensation.bias.copy_(solution[:, -1])
    take_from_first((compensation.weight, compensation.bias))


def _sums(module: nn.Module, tile: UnitCall) -> Tensor:
    """With z = (x, 1), the sums over tokens of z z^T and of (y - y_q) z^T, stacked: float64 [2 C + 1, C + 1]."""
    x = input_of(module, tile.args, tile.kwargs).flatten(0, -2)  # [tokens, C]
    outputs = rows_of(outputs_of(module(*tile.args, **tile.kwargs)), len(tile.targets))  # [U, E]
    missing = (tile.targets - outputs).reshape(x.shape).double()
    counts = x.ne(0).any(1, keepdim=True)  # padding does not
    z = torch.cat([x, torch.ones_like(x[:, :1])], 1).double() * counts
    return torch.cat([z, missing], 1).T @ z
