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

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import tensors_of
from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.units import UnitCall, UnitCalls, batches, rows_of
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers, quantizers_of
from apq_mmdet.policy import refuse_unknown
from apq_mmdet.quantizers import Quantizer, QuantizerMode

FIRST_FACTOR, LAST_FACTOR = 0.3, 1.1  # of the ranges that step 2 tries


@dataclass(frozen=True)
class CompensationConfig:
    """How weights make up for errors.

    Args:
        activations: step 1, make up for the error of quantized inputs; else W' is W.
        rounding: step 3, spread rounding errors; else every weight is rounded to its nearest code.
        ranges: number of range factors in step 2; 0 keeps the ranges of the search.
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
        if not hasattr(config, "keys"):
            raise BadInputError(f"{where}: expected dict(activations=..., ...) or None, got {config!r}")
        refuse_unknown(config, [f.name for f in fields(cls)], where)
        config = dict(config)
        for key in ("activations", "rounding", "weighted"):
            if not isinstance(config.get(key, True), bool):
                raise BadInputError(f"{where}.{key}: expected True or False, got {config[key]!r}")
        ranges, damping = config.get("ranges", 0), config.get("damping", 1.0)
        if isinstance(ranges, bool) or not isinstance(ranges, int) or ranges < 0:
            raise BadInputError(f"{where}.ranges: expected a whole number >= 0, got {ranges!r}")
        if isinstance(damping, bool) or not isinstance(damping, int | float) or not damping > 0:
            raise BadInputError(f"{where}.damping: expected a number above 0, got {damping!r}")
        return cls(**config)


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

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@torch.no_grad()
def compensate(module: nn.Module, calls: UnitCalls, config: CompensationConfig) -> dict[str, float]:
    """Replace the quantized weights of a block's linears and plain convolutions, in the order of their execution.

    Each layer is judged on what the layers before it, already compensated, make of their quantized inputs. Weights end
    on their quantizers' grids, so that quantizing them again changes no bit. Layers of other kinds stay as they are.

    Args:
        module: the block, or its view of units; its quantizers are calibrated.
        calls: inputs, float outputs and gradients of this process' images; in a distributed run sums of processes are
            added in the order of their ranks, so that all end alike.
        config: what is done.

    Returns:
        By layer, how much of sum w |W x + b - W'' x' - b''|^2 with the weights of before was taken away, in a unit
        that compares within a layer only.

    Raises:
        CalibrationError: a sum over tokens is NaN or infinite.
    """
    for quantizer in quantizers_of(module):
        quantizer.mode = QuantizerMode.QUANTIZE
    gains: dict[str, float] = {}
    for name, layer in _layers(module, calls):
        moments = _moments(module, layer, calls, config.weighted)
        if moments is None:
            continue
        if not all(bool(t.isfinite().all()) for t in vars(moments).values()):
            raise CalibrationError(f"compensation of layer {name!r}: its inputs or gradients are NaN or infinite")
        gains[name] = _compensate_layer(layer, moments, config)
    return gains


def _layers(module: nn.Module, calls: UnitCalls) -> list[tuple[str, QuantizedLayer]]:
    """Layers whose weights are compensated, by execution in the first calls of all kinds of all processes."""
    names = {layer: name for name, layer in quantized_layers(module) if _fits(layer)}
    ran: list[str] = []
    handles = [layer.register_forward_pre_hook(lambda m, _: ran.append(names[m])) for layer in names]
    try:
        for call in calls.kinds():
            module(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    order = dict.fromkeys(name for part in gather(ran) for name in part)
    layers = {name: layer for layer, name in names.items()}
    return [(name, layers[name]) for name in order]


def _fits(layer: QuantizedLayer) -> bool:
    plain = layer.kind == "Linear" or (layer.kind == "Conv2d" and layer.groups == 1 and layer.padding_mode == "zeros")
    return plain and "weight" in layer.quantizers


def _moments(module: nn.Module, layer: QuantizedLayer, calls: UnitCalls, weighted: bool) -> Moments | None:
    """Sums over all calls of all processes, or None if the layer never ran."""
    own: Moments | None = None
    for batch in batches(calls):
        for _, _, tile in batch.tiles():
            for part in _tokens(module, layer, tile, weighted):
                own = part if own is None else own + part
    found = [m for m in gather(None if own is None else _to(own, "cpu")) if m is not None]
    return _to(sum(found[1:], found[0]), layer.weight.device) if found else None


def _to(moments: Moments, device: torch.device | str) -> Moments:
    return Moments(*(t.to(device) for t in vars(moments).values()))


def _tokens(module: nn.Module, layer: QuantizedLayer, tile: UnitCall, weighted: bool) -> Iterator[Moments]:
    """Moments of each run of the layer in one call of the block."""
    with torch.set_grad_enabled(weighted), float_only(module):
        floats, outputs, rows = _watched(module, layer, tile)
        grads: tuple[Tensor | None, ...] = (None,) * len(outputs)
        if weighted and rows.requires_grad:
            grads = torch.autograd.grad(rows, outputs, tile.grads, allow_unused=True)
    quantized, _, _ = _watched(module, layer, tile)
    for x, x_quantized, grad in zip(floats, quantized, grads, strict=True):
        columns = _columns(layer, x.detach())
        importance = columns.new_ones(len(columns))
        if weighted:
            importance = importance.zero_() if grad is None else _positions(layer, grad).square().mean(1)
        if "input" in layer.quantizers:
            x_quantized = layer.quantizers["input"](x_quantized)
        yield Moments.of(columns, _columns(layer, x_quantized), importance)


def _watched(module: nn.Module, layer: QuantizedLayer, tile: UnitCall) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Inputs and outputs of the layer in one call, and the block's output rows."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if torch.is_grad_enabled() and not output.requires_grad:
            output = output.requires_grad_()
        inputs.append(args[0])
        outputs.append(output)
        return output.clone()  # what follows may modify it in place

    handle = layer.register_forward_hook(hook)
    try:
        rows = rows_of(tensors_of(module(*tile.args, **tile.kwargs)), len(tile.targets))
    finally:
        handle.remove()
    return inputs, outputs, rows


def _columns(layer: QuantizedLayer, x: Tensor) -> Tensor:
    """What each output position multiplies with the weight, [positions, K]."""
    if layer.kind == "Linear":
        return x.flatten(0, -2)
    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)  # [B, K, L]
    return patches.transpose(1, 2).flatten(0, 1)


def _positions(layer: QuantizedLayer, output: Tensor) -> Tensor:
    """[positions, N], in the order of ``_columns``."""
    return output.flatten(0, -2) if layer.kind == "Linear" else output.flatten(2).transpose(1, 2).flatten(0, 1)


def _compensate_layer(layer: QuantizedLayer, moments: Moments, config: CompensationConfig) -> float:
    quantizer = layer.quantizers["weight"]
    weight = layer.weight.flatten(1).double()  # [N, K]
    moments = moments if layer.bias is None else moments.centered()
    before = _error(weight, quantizer.fake_quantize(layer.weight).flatten(1).double(), moments)
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
        shifted = _nearest(wanted, scale, low, high)
    codes = shifted.to(torch.int32).view_as(layer.weight)
    codes = codes + quantizer.per_element(quantizer.zero_point, layer.weight)
    layer.weight.copy_(quantizer.decode(codes))
    after = layer.weight.flatten(1).double()
    if layer.bias is not None and bool(moments.weight > 0):
        layer.bias.add_((weight @ moments.mean - after @ moments.quantized_mean) / moments.weight)
    return float(before - _error(weight, after, moments))


def _eye(like: Tensor) -> Tensor:
    return torch.eye(len(like), dtype=like.dtype, device=like.device)


def _error(weight: Tensor, other: Tensor, moments: Moments) -> Tensor:
    """sum w |W x - W' x'|^2, less the part that no W' has a say in."""
    return ((other @ moments.quantized) * other).sum() - 2 * ((weight @ moments.mixed) * other).sum()


def _bounds(quantizer: Quantizer, layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, and lowest and highest code less the zero point, of each row of W, float64 [N, 1]."""
    low = quantizer.code_min - quantizer.zero_point
    high = low + quantizer.code_max - quantizer.code_min
    rows = (quantizer.per_element(p, layer.weight).flatten()[:, None] for p in (quantizer.scale, low, high))
    return tuple(p.double().expand(len(layer.weight), 1) for p in rows)


def _nearest(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes less the zero point; all broadcast against [N, K]."""
    return torch.minimum(torch.maximum((weight / scale).round(), low), high)


def _fit_ranges(quantizer: Quantizer, weight: Tensor, hessian: Tensor, layer: QuantizedLayer, number: int) -> None:
    """Step 2: the range factor of each group that makes (W - Q) H (W - Q)^T least."""
    quantizer.observed = None
    quantizer.observe(weight.to(layer.weight.dtype).view_as(layer.weight))
    found: list[tuple[Tensor, ...]] = []
    errors = []
    for factor in torch.linspace(FIRST_FACTOR, LAST_FACTOR, number).tolist():
        found.append(quantizer.parameters_for(*quantizer.observed, factor))
        quantizer.set_parameters(*found[-1])
        scale, low, high = _bounds(quantizer, layer)
        gap = _nearest(weight, scale, low, high) * scale - weight  # [N, K]
        errors.append(((gap @ hessian) * gap).sum(1).view(quantizer.groups, -1).sum(1))  # [G]
    best = torch.stack(errors).argmin(0, keepdim=True)  # [1, G]
    quantizer.set_parameters(*(torch.stack(column).gather(0, best)[0] for column in zip(*found, strict=True)))


def spread_rounding(weight: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Step 3: codes less the zero point, [N, K], that make (W - Q) H (W - Q)^T small.

    Columns are rounded in falling order of H's diagonal. What rounding a column costs is made up for by the columns
    that are still free, in closed form: with U the upper Cholesky factor of H^-1, the error of column j over U[j, j]
    times row j of U is taken off them.

    Args:
        weight: [N, K], float64.
        hessian: [K, K], positive definite.
        scale, low, high: step, lowest and highest code less the zero point, [N, 1].
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    left = weight[:, order].clone()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes = torch.empty_like(left)
    for j in range(left.shape[1]):
        column = left[:, j : j + 1]
        codes[:, j : j + 1] = _nearest(column, scale, low, high)
        error = (column - codes[:, j : j + 1] * scale) / upper[j, j]
        left[:, j + 1 :].addmm_(error, upper[j : j + 1, j + 1 :], alpha=-1)
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result
