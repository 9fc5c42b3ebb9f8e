"""Compensation: weights that make up for the errors of quantized activations and of their own rounding.

For a layer with weight W [N, K] whose float input is x and whose quantized input is x', both over all calibration
tokens, with weights of importance w:

1. W' = argmin sum_t w_t |W x_t - W' x'_t|^2 + lambda |W' - W|^2, the ridge regression of ERQ (Zhong et al., ICML 2024);
2. ranges of W' by group, each the least of (W' - Q(W')) H (W' - Q(W'))^T, with H = sum_t w_t x'_t x'_t^T;
3. codes column by column, each column's rounding error spread over the columns that follow (OBQ and GPTQ, Frantar et
   al., NeurIPS 2022 and ICLR 2023);
4. the bias takes the mean of what remains.

All but the last need two K x K matrices only, however many tokens there are.
"""

import contextlib
import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import SeenEnough, outputs_of
from apq_mmdet.calibration.columns import TOKENS, columns_of, has_columns, positions_of
from apq_mmdet.calibration.distributed import by_shard, take_from_first
from apq_mmdet.calibration.replay import fixed_weights, layer_runs
from apq_mmdet.calibration.spread_rounding import nearest_codes, spread_rounding
from apq_mmdet.calibration.units import Batch, UnitCall, UnitCalls, rows_of, shards
from apq_mmdet.checks import check_bool, check_fields, check_number, check_whole
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers.base import QuantizedLayer, quantized_layers, quantizers_of
from apq_mmdet.quantizers import Quantizer, QuantizerMode

FIRST_FACTOR, LAST_FACTOR = 0.3, 1.1  # of the ranges that step 2 tries
LEAST_VARIATION = 1e-12  # share of an input's power; what varies less is rounding noise


@dataclass(frozen=True)
class CompensationConfig:
    """How weights make up for errors.

    Args:
        activations: step 1, make up for the error of quantized inputs; else W' is W.
        rounding: step 3, spread rounding errors; else every weight is rounded to its nearest code.
        ranges: number of range factors in step 2, two or more; 0 keeps the ranges of the search.
        damping: lambda, relative to the mean diagonal of H; also what keeps step 3 well posed.
        weighted: importance of a token is the mean square of the gradient at the layer's output; else all are equal.
    """

    activations: bool = True
    rounding: bool = True
    ranges: int = 41
    damping: float = 0.02
    weighted: bool = True

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str) -> "CompensationConfig":
        """Validate; BadInputError names the key."""
        config = check_fields(config, cls, where, "dict(activations=..., ...) or None")
        for key in ("activations", "rounding", "weighted"):
            check_bool(config.get(key, True), f"{where}.{key}")
        if check_whole(config.get("ranges", 0), f"{where}.ranges", 0) == 1:
            raise BadInputError(f"{where}.ranges: expected 0 or a whole number >= 2, got 1")
        made = cls(**config)
        if not (made.activations or made.rounding or made.ranges):
            raise BadInputError(f"{where}: nothing is made up for with activations, rounding and ranges off; use None")
        if check_number(config.get("damping", 1.0), f"{where}.damping") == 0:
            raise BadInputError(f"{where}.damping: expected a number above 0, got 0")
        return made


@dataclass
class Moments:
    """Sums over tokens of one layer, float64.

    Attributes:
        quantized: sum of w x' x'^T, [K, K].
        mixed: sum of w x x'^T, [K, K].
        mean, quantized_mean: sum of w x and of w x', [K].
        weight: sum of w, a scalar.
    """

    quantized: Tensor
    mixed: Tensor
    mean: Tensor
    quantized_mean: Tensor
    weight: Tensor

    @classmethod
    def of(cls, x: Tensor, quantized: Tensor, weight: Tensor) -> "Moments":
        """Of tokens x, x' [n, K] with importance [n]."""
        x, quantized, weight = x.double(), quantized.double(), weight.double()
        weighted = quantized * weight[:, None]
        return cls(weighted.T @ quantized, x.T @ weighted, weight @ x, weight @ quantized, weight.sum())

    def centered(self) -> "Moments":
        """Those around the weighted means: what counts where a bias makes up for any constant."""
        total = self.weight.clamp_min(torch.finfo(torch.float64).tiny)
        quantized = self.quantized - torch.outer(self.quantized_mean, self.quantized_mean) / total
        mixed = self.mixed - torch.outer(self.mean, self.quantized_mean) / total
        return Moments(quantized, mixed, self.mean, self.quantized_mean, self.weight)

    def __iadd__(self, other: "Moments") -> "Moments":
        for own, others in zip(vars(self).values(), vars(other).values(), strict=True):
            own += others
        return self


@torch.no_grad()
def compensate(module: nn.Module, calls: UnitCalls, config: CompensationConfig) -> None:
    """Replace the quantized weights of a block's linears and plain convolutions, in the order of their execution.

    Each layer's quantized inputs are what the layers before it, already compensated, make of theirs; its float inputs
    are those of the float block. Weights end on their quantizers' grids, so that quantizing them again changes no bit.
    Layers of other kinds or with more than MOST_INPUTS inputs (a box head's first one) stay as they are, and so do
    those whose inputs never vary or whose gradients are all zero.

    Args:
        module: the block, or its view of units; its quantizers are calibrated.
        calls: inputs, float outputs and gradients of this process' images; in a distributed run the sums of all
            processes are added in the order of the images, so that all end alike, however many there are.
        config: what is done.

    Raises:
        CalibrationError: a sum over tokens is NaN or infinite.
    """
    order = layer_runs(module, calls)
    # weights change as we go, the float inputs and gradients must not
    reference = copy.deepcopy(module).requires_grad_(False)
    for block, mode in ((reference, QuantizerMode.FLOAT), (module, QuantizerMode.QUANTIZE)):
        for quantizer in quantizers_of(block):
            quantizer.mode = mode
    layers = dict(quantized_layers(module))
    for name, runs in order.items():
        if not is_compensated(layers[name]):
            continue
        with fixed_weights(module):
            moments = _moments(module, reference, name, runs, calls, config.weighted)
        if not all(bool(t.isfinite().all()) for t in vars(moments).values()):
            raise CalibrationError(f"compensation of layer {name!r}: its inputs or gradients are NaN or infinite")
        _compensate_layer(layers[name], moments, config)
        take_from_first(_changed_tensors(layers[name]))


def _changed_tensors(layer: QuantizedLayer) -> list[Tensor]:
    quantizer = layer.quantizers["weight"]
    tensors = (layer.weight, layer.bias, quantizer.scale, quantizer.zero_point)
    return [tensor for tensor in tensors if tensor is not None]


def is_compensated(layer: QuantizedLayer) -> bool:
    """Whether ``compensate`` replaces the weights of a layer."""
    return "weight" in layer.quantizers and has_columns(layer)


def _moments(
    module: nn.Module, reference: nn.Module, name: str, runs: int, calls: UnitCalls, weighted: bool
) -> Moments:
    """Sums over all calls of all processes, in at least one of which the layer runs."""

    def of_shard(group: Iterator[Batch]) -> Moments | None:
        tiles = (tile for batch in group for _, _, tile in batch.tiles())
        total = _total(part for tile in tiles for part in _tokens(module, reference, name, runs, tile, weighted))
        return None if total is None else _to(total, "cpu")

    total = _total(by_shard((shard, of_shard(group)) for shard, group in shards(calls)))
    return _to(total, module.get_submodule(name).weight.device)


def _total(parts: Iterable[Moments]) -> Moments | None:
    total: Moments | None = None
    for part in parts:
        if total is None:
            total = part
        else:
            total += part
        del part  # before the next one is made
    return total


def _to(moments: Moments, device: torch.device | str) -> Moments:
    return Moments(*(t.to(device) for t in vars(moments).values()))


def _tokens(
    module: nn.Module, reference: nn.Module, name: str, runs: int, tile: UnitCall, weighted: bool
) -> Iterator[Moments]:
    """Moments of the tokens, some at a time, of each run of the layer in one call of the block."""
    layer = module.get_submodule(name)
    with torch.set_grad_enabled(weighted):
        floats, outputs, rows = _watched(reference, reference.get_submodule(name), runs, tile.of_float)
        grads: tuple[Tensor | None, ...] = (None,) * len(outputs)
        if weighted and rows.requires_grad:
            grads = torch.autograd.grad(rows, outputs, tile.grads, allow_unused=True)
    quantized, _, _ = _watched(module, layer, runs, tile)
    if len(quantized) != len(floats):
        raise CalibrationError(
            f"compensation of layer {name!r}: it runs {len(floats)} times in the float block, but {len(quantized)} "
            f"times in the quantized one; leave the block float with an override"
        )
    for x, x_quantized, grad in zip(floats, quantized, grads, strict=True):
        columns = columns_of(layer, layer.divided_input(x.detach()))
        importance = columns.new_ones(len(columns))
        if weighted:
            importance = importance.zero_() if grad is None else positions_of(layer, grad).square().mean(1)
        x_quantized = layer.quantize("input", x_quantized)
        tensors = (columns, columns_of(layer, x_quantized), importance)
        yield from map(Moments.of, *(t.split(TOKENS) for t in tensors))


def _watched(
    module: nn.Module, layer: QuantizedLayer, runs: int, tile: UnitCall
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    """Inputs and outputs of the layer in one call; where there are gradients, also the block's output rows.

    Without gradients the block runs no further than to the end of so many ``runs`` of the layer.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.requires_grad_()
        inputs.append(args[0].detach().clone())  # what follows may modify it in place, as it may the output
        outputs.append(output)
        if len(inputs) == runs and not torch.is_grad_enabled():
            raise SeenEnough
        return output.clone()

    rows = None
    with contextlib.suppress(SeenEnough), layer.register_forward_hook(hook):
        rows = rows_of(outputs_of(module(*tile.args, **tile.kwargs)), len(tile.targets))
    return inputs, outputs, rows


def _compensate_layer(layer: QuantizedLayer, moments: Moments, config: CompensationConfig) -> None:
    quantizer = layer.quantizers["weight"]
    weight = layer.weight.flatten(1).to(torch.float64, copy=True)  # [N, K]; the layer's own is written to below
    power = moments.quantized.diagonal().mean()
    moments = moments if layer.bias is None else moments.centered()
    if not moments.quantized.diagonal().mean() > LEAST_VARIATION * power:
        return
    hessian = moments.quantized + config.damping * moments.quantized.diagonal().mean() * _eye(moments.quantized)
    wanted = weight
    if config.activations:
        damping = hessian - moments.quantized
        wanted = torch.linalg.solve(hessian, (weight @ (moments.mixed + damping)).T).T
    if config.ranges:
        _fit_ranges(quantizer, wanted, moments.quantized, layer, config.ranges)
    scale, low, high = _bounds(quantizer, layer)
    if config.rounding:
        shifted = spread_rounding(wanted, hessian, scale, low, high)
    else:
        shifted = nearest_codes(wanted, scale, low, high)
    codes = shifted.to(torch.int32).view_as(layer.weight)
    codes = codes + quantizer.per_element(quantizer.zero_point, layer.weight)
    layer.weight.copy_(quantizer.decode(codes))
    if layer.bias is not None:
        after = layer.weight.flatten(1).double()
        layer.bias.add_((weight @ moments.mean - after @ moments.quantized_mean) / moments.weight)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _bounds(quantizer: Quantizer, layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, and lowest and highest code less the zero point, of each row of W, float64 [N, 1]."""
    parameters = (quantizer.scale, *quantizer.shifted_bounds)
    rows = (quantizer.per_element(p, layer.weight).flatten()[:, None] for p in parameters)
    return tuple(p.double().expand(len(layer.weight), 1) for p in rows)


def _fit_ranges(quantizer: Quantizer, weight: Tensor, hessian: Tensor, layer: QuantizedLayer, number: int) -> None:
    """Step 2: the range factor of each group that makes (W - Q) H (W - Q)^T least."""
    quantizer.forget_observed()
    quantizer.observe(weight.to(layer.weight.dtype).view_as(layer.weight))
    found: list[tuple[Tensor, ...]] = []
    errors = []
    hessian = hessian.float()  # a millionth of an error, which ties alone notice, for half of the time
    for factor in torch.linspace(FIRST_FACTOR, LAST_FACTOR, number).tolist():
        found.append(quantizer.parameters_for(*quantizer.observed, factor))
        quantizer.set_parameters(*found[-1])
        scale, low, high = _bounds(quantizer, layer)
        gap = (nearest_codes(weight, scale, low, high) * scale - weight).float()  # [N, K]
        errors.append(((gap @ hessian) * gap).sum(1).view(quantizer.groups, -1).sum(1))  # [G]
    best = torch.stack(errors).argmin(0, keepdim=True)  # [1, G]
    quantizer.set_parameters(*(torch.stack(column).gather(0, best)[0] for column in zip(*found, strict=True)))
