"""Rescalings: a factor per channel moved from one tensor to the next, which keeps the float function.

Channels of very different ranges cost a per-tensor quantizer its codes. Where a linear layer follows, the ranges can be
made even at no cost: what one tensor is divided by, the next one's weights are multiplied by. Full equalization behind
a LayerNorm is the scale reparameterization of RepQ-ViT (arXiv 2212.08254, section 3.3), a strength between 0 and 1 a
migration as in SmoothQuant (arXiv 2211.10438, equation 4, without its weight term). RepQ-ViT's shift of zero points is
left out on purpose: Swin pads windows with zeros behind the norm, and zeros stay zeros under a scale alone.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Set
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import hooked
from apq_mmdet.calibration.distributed import gather, share_observed
from apq_mmdet.calibration.units import UnitCalls
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers, quantizers_of
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode
from apq_mmdet.registry import ByClass

MOST = 256.0  # factors stay in 1 / MOST..MOST: more than pretrained channels differ, little enough for float32

Extent = tuple[Tensor, Tensor]  # lowest and highest value of each channel


class Rescaling(ABC):
    """A place where factors c, one per channel, can be taken out of an activation.

    Args:
        name: of the place inside its block.
        layer: the linear layer at which the activation is seen, [..., channels], or convolution, [B, channels, H, W].
        side: 'input' or 'output' of that layer.
        operands: (layer, role) of everything that is rescaled and may be quantized.
        norm: what stands before the layer and is rescaled too, if anything.
    """

    def __init__(
        self,
        name: str,
        layer: nn.Linear | nn.Conv2d,
        side: str,
        operands: Sequence[tuple[nn.Module, str]],
        norm: nn.LayerNorm | None = None,
    ) -> None:
        self.name, self.layer, self.side, self.operands, self.norm = name, layer, side, tuple(operands), norm

    def parameters(self) -> set[nn.Parameter]:
        """Those of all modules that ``divide`` may change."""
        modules = (self.norm, *(layer for layer, _ in self.operands))
        return {p for module in modules if module is not None for p in module.parameters(recurse=False)}

    @abstractmethod
    def divide(self, c: Tensor) -> None:
        """Divide the activation by ``c`` [channels] > 0 and multiply what follows, in place; float64 inside."""

    @abstractmethod
    def spans(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Size of each channel by tensor role, from its extent at ``side`` of ``layer``: what ``divide`` scales."""

    def imbalance(self, low: Tensor, high: Tensor) -> Tensor:
        """The factors, up to a common one, that make all channels even."""
        (span,) = self.spans(low, high).values()
        return span


class NormRescaling(Rescaling):
    """Output of a LayerNorm, input of the one linear layer behind it: gamma / c, beta / c, W[:, j] c_j."""

    def __init__(self, name: str, norm: nn.LayerNorm, linear: nn.Linear) -> None:
        super().__init__(name, linear, "input", [(linear, "input"), (linear, "weight")], norm)

    def divide(self, c: Tensor) -> None:
        """See the base class."""
        c = c.double()
        _multiply(self.norm.weight, 1 / c)
        _multiply(self.norm.bias, 1 / c)
        _multiply(self.layer.weight, c)

    def spans(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """max - min with zero included, as affine quantizers see it."""
        return {"input": high.clamp(min=0) - low.clamp(max=0)}


class InputRescaling(Rescaling):
    """Input of a quantized layer that divides it by factors of its own: x_j / c_j, W[:, j] c_j.

    For inputs that no linear operation makes, such as those behind a GELU. In a grouped convolution j counts the
    channels of each row's own group.
    """

    def __init__(self, name: str, layer: QuantizedLayer) -> None:
        super().__init__(name, layer, "input", [(layer, "input"), (layer, "weight")])

    def divide(self, c: Tensor) -> None:
        """See the base class."""
        c = c.double()
        _multiply(self.layer.input_factors, c)
        weight, groups = self.layer.weight, getattr(self.layer, "groups", 1)
        columns = c.view(groups, -1).repeat_interleave(len(weight) // groups, 0)  # [out, in / groups]
        _multiply(weight, columns.view(*columns.shape, *[1] * (weight.dim() - 2)))

    def spans(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """max - min with zero included, of what is left after dividing by the factors so far."""
        return {"input": (high.clamp(min=0) - low.clamp(max=0)) / self.layer.input_factors.cpu().double()}


class QueryKeyRescaling(Rescaling):
    """Query against key of a fused qkv with rows [3, heads, d]: ``(q / c) (k c)^T``."""

    def __init__(self, name: str, qkv: nn.Linear, product: nn.Module | None) -> None:
        operands = [(qkv, "weight")]
        if product is not None:
            operands += [(product, "query"), (product, "key")]
        super().__init__(name, qkv, "output", operands)

    def divide(self, c: Tensor) -> None:
        """See the base class."""
        c = c.double()
        factors = torch.cat([1 / c, c, torch.ones_like(c)])  # [3 C]
        _multiply(self.layer.weight, factors[:, None])
        _multiply(self.layer.bias, factors)

    def spans(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Largest magnitudes; the query's before the scale of attention, a common factor."""
        query, key, _ = torch.maximum(-low, high).chunk(3)
        return {"query": query, "key": key}

    def imbalance(self, low: Tensor, high: Tensor) -> Tensor:
        """sqrt(max|q| / max|k|), behind which both have the size sqrt(max|q| max|k|)."""
        spans = self.spans(low, high)
        return (spans["query"] / spans["key"]).sqrt()


class ValueRescaling(Rescaling):
    """Value of a fused qkv with rows [3, heads, d] against the projection: ``A (v / c)``, W_proj[:, j] c_j."""

    def __init__(self, name: str, qkv: nn.Linear, proj: nn.Linear, product: nn.Module | None) -> None:
        operands = [(qkv, "weight"), (proj, "input"), (proj, "weight")]
        if product is not None:
            operands.append((product, "value"))
        super().__init__(name, qkv, "output", operands)
        self.proj = proj

    def divide(self, c: Tensor) -> None:
        """See the base class."""
        c = c.double()
        one = torch.ones_like(c)
        factors = torch.cat([one, one, 1 / c])  # [3 C]
        _multiply(self.layer.weight, factors[:, None])
        _multiply(self.layer.bias, factors)
        _multiply(self.proj.weight, c)

    def spans(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        """Largest magnitudes."""
        return {"value": torch.maximum(-low, high).chunk(3)[2]}


@torch.no_grad()
def _multiply(parameter: Tensor | None, factors: Tensor) -> None:
    if parameter is not None:
        parameter.copy_(parameter.double() * factors.to(parameter.device))


RESCALINGS = ByClass()  # block class -> block -> its rescalings


def rescalings_of(block: nn.Module) -> list[Rescaling]:
    """The rescalings of a block: those registered for its class, then those of layers that divide their inputs."""
    make = RESCALINGS.find(block)
    registered = [] if make is None else make(block)
    even = {place.layer for place in registered if place.side == "input"}
    dividing = [(name, layer) for name, layer in quantized_layers(block) if layer.input_factors is not None]
    return registered + [
        InputRescaling(f"{name}.input", layer)
        for name, layer in dividing
        if layer not in even and layer.input_centers is None  # those: center_inputs
    ]


@torch.no_grad()
def channel_extents(places: list[Rescaling], run: Callable[[], None]) -> list[Extent | None]:
    """Lowest and highest value, float64 [channels] on the CPU, of each place's activation in all processes.

    None where none of them has any: the layer does not run.

    Args:
        places: rescalings of the module.
        run: runs the float module on this process' calls; at least one process has one.
    """
    seen: dict[tuple[nn.Module, str], Extent] = {}

    def look(key: tuple[nn.Module, str], x: Tensor) -> None:
        if not x.numel():
            return
        axis = -3 if isinstance(key[0], nn.Conv2d) else -1
        by_channel = x.detach().movedim(axis, -1)
        low, high = by_channel.reshape(-1, by_channel.shape[-1]).aminmax(dim=0)
        if key in seen:
            low, high = torch.minimum(low, seen[key][0]), torch.maximum(high, seen[key][1])
        seen[key] = (low, high)

    keys = [(place.layer, place.side) for place in places]
    hooks = (
        key[0].register_forward_hook(lambda _, args, output, k=key: look(k, args[0] if k[1] == "input" else output))
        for key in dict.fromkeys(keys)
    )
    with hooked(hooks):
        run()
    own = [tuple(t.cpu().double() for t in seen[key]) if key in seen else None for key in keys]
    return [_merged([extent for extent in found if extent]) for found in zip(*gather(own), strict=True)]


def _merged(extents: list[Extent]) -> Extent | None:
    if not extents:
        return None
    lows, highs = zip(*extents, strict=True)
    return torch.stack(lows).amin(0), torch.stack(highs).amax(0)


def balancing_factors(imbalance: Tensor, strength: float) -> Tensor:
    """``(imbalance / its geometric mean) ** strength``, bounded by MOST; float64 [channels].

    A channel without extent (zero, infinite or NaN imbalance) gets 1 and has no say in the mean.
    """
    usable = imbalance.isfinite() & (imbalance > 0)
    logs = torch.where(usable, imbalance, torch.ones_like(imbalance)).double().log()
    mean = logs.sum() / usable.sum().clamp(min=1)  # unusable ones are zero
    factors = (strength * (logs - mean)).exp().clamp(1 / MOST, MOST)
    return torch.where(usable, factors, torch.ones_like(factors))


@torch.no_grad()
def equalize(
    block: nn.Module, module: nn.Module, calls: UnitCalls, strength: float, shared: Set[nn.Parameter] = frozenset()
) -> dict[str, Tensor]:
    """Make the channel ranges of a block more even, and observe the ranges of what was rescaled anew.

    In a distributed run every process calls this and does the same.

    Args:
        block: its parameters are rescaled in place.
        module: its view of units, or itself; maps the calls' inputs to their outputs.
        calls: float inputs on this process' images; at least one process has a call. Observed ranges are afterwards
            those on these calls, so samples give the ranges of samples.
        strength: 0 changes nothing, 1 makes all channels even.
        shared: parameters that are used elsewhere too; what would change such stays as it is.

    Returns:
        The factors c of each rescaling by its name, float64 [channels]; without those of layers that do not run here.
    """
    places = [place for place in rescalings_of(block) if shared.isdisjoint(place.parameters())]
    if not places:
        return {}

    run = partial(run_images, block, module, calls)
    with float_only(block):
        factors = {}
        # a layer divides what the other rescalings leave of its input
        dividing = [place for place in places if isinstance(place, InputRescaling)]
        for group in filter(None, ([place for place in places if place not in dividing], dividing)):
            for place, extent in zip(group, channel_extents(group, run), strict=True):
                if extent is not None:
                    factors[place.name] = balancing_factors(place.imbalance(*extent), strength)
                    place.divide(factors[place.name])
        observe_anew([operand for place in places if place.name in factors for operand in place.operands], run)
    return factors


def run_images(block: nn.Module, module: nn.Module, calls: UnitCalls) -> None:
    """Run all calls of a block; its observers are told where an image ends."""
    for _, of_image in groupby(calls, key=lambda call: call.image):
        for call in of_image:
            module(*call.args, **call.kwargs)
        for quantizer in quantizers_of(block):
            quantizer.observer.end_image()


def observe_anew(operands: Sequence[tuple[nn.Module, str]], run: Callable[[], None]) -> None:
    """Replace the observed ranges of those (layer, role) that are quantized, in all processes.

    Args:
        operands: what has been changed.
        run: runs the float module on this process' calls.
    """
    found = {
        (layer, role): layer.quantizers[role] for layer, role in operands if role in getattr(layer, "quantizers", ())
    }
    for quantizer in found.values():
        quantizer.forget_observed()
    activations = [quantizer for (_, role), quantizer in found.items() if role != "weight"]
    with quantizer_mode(activations, QuantizerMode.OBSERVE):
        run()
    share_observed(activations)
    for (layer, role), quantizer in found.items():
        if role == "weight":
            quantizer.observe(layer.weight)
