"""Squared errors of a weight's candidate ranges from two sums over tokens, however many candidates there are.

With x a layer's input in the float block, x' the quantized input, d = x' - x, and D = W' - W what a candidate does to
the weight,

    sum_t |W' x'_t - W x_t|^2 = tr(D G D^T) + 2 tr(D H W^T) + sum_t |W d_t|^2,   G = sum x' x'^T,   H = sum x' d^T

and the last term is the same for all. Every term is of the size of an error, so that none of them cancels a larger one.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from apq_mmdet.calibration.blocks import tensors_of
from apq_mmdet.calibration.columns import MOST_INPUTS, TOKENS
from apq_mmdet.calibration.distributed import by_shard, gather
from apq_mmdet.calibration.recipe import SearchConfig
from apq_mmdet.calibration.scoring import Candidate
from apq_mmdet.calibration.units import Batch, UnitCalls, shards
from apq_mmdet.layers.base import QuantizedLayer
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode


def in_closed_form(search: SearchConfig, layer: QuantizedLayer, role: str, candidates: int) -> bool:
    """Whether sums over tokens tell what a search asks for, with less work than a run for each candidate.

    They tell plain squared errors at the output of a linear layer. (A convolution's columns are many times its input.)
    """
    plain = search.objective["type"] == "mse" and not search.objective.get("eliminate")
    if not (search.metric == "module" and plain and role == "weight" and layer.kind == "Linear"):
        return False
    outputs, inputs = layer.weight.shape
    return inputs <= MOST_INPUTS and 2 * inputs < candidates * outputs


def weight_errors(layer: QuantizedLayer, calls: UnitCalls, candidates: Sequence[Candidate]) -> Tensor:
    """Squared error of the layer's output for each candidate of its weight, up to a common constant.

    Args:
        layer: linear; its input is quantized as its quantizer is set.
        calls: of the layer in the float block, on this process' images; sums are those of all processes.
        candidates: of the weight's range.

    Returns:
        float64 [candidates]; zeros where the layer ran on no image.
    """
    total: Tensor | None = None  # [2, K, K]
    with quantizer_mode(list(layer.quantizers.values()), QuantizerMode.QUANTIZE):
        for part in by_shard((shard, _sums(layer, group).cpu()) for shard, group in shards(calls)):
            total = part if total is None else total.add_(part)
            del part  # before the next one is made
    if total is None:
        return torch.zeros(len(candidates), dtype=torch.float64)
    gram, mixed = total.to(layer.weight.device)
    gram, slope = gram.to(layer.weight.dtype), 2 * (layer.weight.double() @ mixed.T)  # [K, K], [N, K]
    errors = torch.stack([_error(layer, candidate, gram, slope) for candidate in candidates])
    return gather(errors)[0]  # machines that compute differently still end alike


def _sums(layer: QuantizedLayer, group: Iterator[Batch]) -> Tensor:
    """G and H over the calls of a shard, float64 [2, K, K]; the products in float32, some tokens at a time."""
    total = layer.weight.new_zeros(2, layer.depth, layer.depth, dtype=torch.float64)
    for batch in group:
        (x,) = tensors_of((batch.stacked.args, batch.stacked.kwargs))
        for part in x.flatten(0, -2).split(TOKENS):
            floats, quantized = layer.divided_input(part), layer.quantize("input", part)  # [tokens, K]
            total[0] += quantized.T @ quantized
            total[1] += quantized.T @ (quantized - floats)
    return total


def _error(layer: QuantizedLayer, candidate: Candidate, gram: Tensor, slope: Tensor) -> Tensor:
    """tr(D G D^T) + 2 tr(D H W^T), a float64 scalar on the CPU."""
    quantizer = layer.quantizers["weight"]
    quantizer.set_parameters(*quantizer.parameters_for(*quantizer.observed, *candidate))
    change = quantizer.fake_quantize(layer.weight) - layer.weight  # [N, K]
    squares = ((change @ gram) * change).sum(dtype=torch.float64)
    return (squares + (change * slope).sum()).cpu()
