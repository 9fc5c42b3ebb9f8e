"""What a layer takes off its input and divides it by, before each token is quantized on a grid of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import hooked
from apq_mmdet.calibration.compensation import LEAST_VARIATION
from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.transforms import InputRescaling, balancing_factors
from apq_mmdet.calibration.units import UnitCalls
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers

FLATTEST = 0.01  # of a channel's power: what varies less counts as varying so much
MIGRATION = 0.75  # what SmoothQuant uses for activations that are hard to quantize


def centered_layers(block: nn.Module) -> dict[str, QuantizedLayer]:
    """Layers of a block that take centers off their inputs, by name."""
    return {name: layer for name, layer in quantized_layers(block) if layer.input_centers is not None}


@torch.no_grad()
def center_inputs(block: nn.Module, module: nn.Module, calls: UnitCalls, strength: float, compensated: bool) -> None:
    """Fit ``input_centers`` and, where a layer has them, ``input_factors`` to the tokens of the float inputs.

    Centers are the means of the channels: what is left is what sets a token apart. Factors are
    ``(sd_j^a / |W_j|^(1 - a)) ** strength`` with a = 0.75, up to a common one: SmoothQuant's migration (arXiv
    2211.10438, equation 4), with the standard deviation of a channel and the norm of the weights behind it where the
    paper takes largest values. So a channel whose errors weigh more gets finer steps. What this cuts from the weights
    behind a channel costs its mean, too, unless a compensated bias makes up for it: elsewhere a deviation counts as at
    least a tenth of the channel's root mean square.

    In a distributed run every process calls this and does the same; sums are added in the order of the images.

    Args:
        block: holds the layers; those that run in no call keep what they have.
        module: its view of units, or itself; maps the calls' inputs to their outputs.
        calls: float inputs on this process' images.
        strength: 0 leaves the factors alone.
        compensated: whether a compensation follows.

    Raises:
        CalibrationError: an input is NaN or infinite.
    """
    layers = centered_layers(block)
    for name, (tokens, total, squares) in _sums(layers, block, module, calls).items():
        if not bool(squares.isfinite().all()):
            raise CalibrationError(f"centers of layer {name!r}: its inputs are NaN or infinite")
        layer, mean, power = layers[name], total / tokens.clamp_min(1), squares / tokens.clamp_min(1)
        if layer.input_factors is not None:
            variance = power - mean.square()
            least = 0.0 if compensated and layer.bias is not None else FLATTEST
            deviation = torch.maximum(variance, least * power).where(variance > LEAST_VARIATION * power, 0.0).sqrt()
            columns = layer.weight.double().norm(dim=0).cpu()  # [channels]
            factors = balancing_factors(deviation**MIGRATION / columns ** (1 - MIGRATION), strength)
            InputRescaling(name, layer).divide(factors)
            mean = mean / factors
        layer.input_centers.copy_(mean)
        if "weight" in layer.quantizers:
            layer.quantizers["weight"].forget_observed()
            layer.quantizers["weight"].observe(layer.weight)


def _sums(
    layers: dict[str, QuantizedLayer], block: nn.Module, module: nn.Module, calls: UnitCalls
) -> dict[str, Tensor]:
    """Number, sum and sum of squares of each layer's tokens on all images of all processes: float64 [3, channels]."""
    own: dict[tuple[int, str], Tensor] = {}  # by image and layer

    def see(name: str, layer: QuantizedLayer, x: Tensor, image: int) -> None:
        x = layer.divided_input(x).reshape(-1, x.shape[-1])  # [tokens, channels]
        total = x.sum(0, dtype=torch.float64)
        squares = torch.linalg.vector_norm(x, dim=0, dtype=torch.float64).square()
        sums = (torch.full_like(total, len(x)), total, squares)
        _add(own, (image, name), torch.stack(sums).cpu())

    with float_only(block):
        for call in calls:
            hooks = (
                layer.register_forward_pre_hook(lambda layer, args, n=name, i=call.image: see(n, layer, args[0], i))
                for name, layer in layers.items()
            )
            with hooked(hooks):
                module(*call.args, **call.kwargs)
    totals: dict[str, Tensor] = {}
    # an image is one process' own: its number and the layer's name are an order without ties
    found = (item for process in gather(own) for item in process.items())
    for (_, name), part in sorted(found, key=lambda item: item[0]):
        _add(totals, name, part)
    return totals


def _add(totals: dict[Any, Tensor], key: Any, part: Tensor) -> None:
    totals[key] = totals[key] + part if key in totals else part
