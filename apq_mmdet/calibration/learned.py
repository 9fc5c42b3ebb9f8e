"""What reconstruction learns about a block: how weights are rounded, and the step sizes of activations.

Each is one flat vector over all layers of the block, so that an optimizer's step, a regulariser or a sum over
processes is one operation, however many layers there are.
"""

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.layers.base import QuantizedLayer, quantized_layers
from apq_mmdet.quantizers import Quantizer, QuantizerMode

ZETA, GAMMA = 1.1, -0.1  # the sigmoid is stretched to this range and cut to 0..1, so that it gets to the ends
WARM_UP = 0.2  # share of the training before the regulariser sets in
FIRST_BETA, LAST_BETA = 20.0, 2.0  # its exponent then, and in the end


class Learned(ABC):
    """Values of a block that are learned.

    Attributes:
        values: [n], a leaf that requires gradients.
    """

    values: Tensor

    @abstractmethod
    def use(self) -> None:
        """Let the block compute with what follows from the values, differentiably, until the next call."""

    @abstractmethod
    def write(self) -> None:
        """Write what was learned into the block's weights or quantizers."""

    def rate(self, done: float) -> float:
        """Share of the learning rate after a share ``done`` of the training."""
        return 1.0

    def own_grad(self, done: float) -> Tensor | float:
        """Gradient of what is minimised beside the block's loss, [n]."""
        return 0.0


class LearnedRounding(Learned):
    """Weights rounded up or down by learning (AdaRound, Nagel et al., ICML 2020, eq. 21 to 24).

    In codes less the zero point ``W' = s clamp(floor(W / s) + h(V), lowest, highest)`` with the rectified sigmoid
    ``h(V) = clamp((zeta - gamma) sigmoid(V) + gamma, 0, 1)``. V starts where W' is W. After a warm-up the regulariser
    ``sum of 1 - |2 h(V) - 1|^beta`` with falling beta draws every h to 0 or 1. In the end h is rounded.

    As the values below and above W do not change, ``W' = below + (above - below) h(V)``.

    Args:
        layers: layers with quantized weights of linear formats; they are left alone until ``write``.
        weight: of the regulariser.

    Attributes:
        values: V, of all weights.
    """

    def __init__(self, layers: list[QuantizedLayer], weight: float) -> None:
        self._layers = layers
        self._weight = weight
        columns = zip(*([t.flatten() for t in _neighbours(layer)] for layer in layers), strict=True)
        self._below, above, share = (torch.cat(column) for column in columns)  # each [n]
        self._gap = above - self._below
        self.values = torch.logit((share - GAMMA) / (ZETA - GAMMA)).requires_grad_()

    def use(self) -> None:
        """See the base class."""
        soft = torch.addcmul(self._below, self._gap, _rectified_sigmoid(self.values.sigmoid()))
        for layer, weight in zip(self._layers, _split_like(soft, self._layers), strict=True):
            layer.quantizers["weight"].fixed = weight

    def own_grad(self, done: float) -> Tensor | float:
        """See the base class; d/dV (1 - |2h - 1|^beta) = -2 beta |2h - 1|^(beta - 1) sign(2h - 1) h'."""
        if done < WARM_UP:
            return 0.0
        beta = LAST_BETA + (FIRST_BETA - LAST_BETA) * (1 - done) / (1 - WARM_UP)
        sigmoid = self.values.detach().sigmoid()
        side = _rectified_sigmoid(sigmoid).mul_(2).sub_(1)  # 2h - 1
        moving = side.abs() < 1
        slope = side.abs().pow_(beta - 1).copysign_(side).mul_(-2 * beta * (ZETA - GAMMA) * self._weight)
        return slope.mul_(moving).mul_(sigmoid).mul_(1 - sigmoid)

    def write(self) -> None:
        """Put the weights on their grids: exactly what their quantizers decode, so that these give the same codes."""
        for layer, up in zip(self._layers, _split_like(self.values.detach() >= 0, self._layers), strict=True):
            codes = torch.where(up, *reversed(_codes_around(layer)))
            layer.weight.copy_(layer.quantizers["weight"].decode(codes))


def _rectified_sigmoid(sigmoid: Tensor) -> Tensor:
    return sigmoid.mul(ZETA - GAMMA).add(GAMMA).clamp(0, 1)


def _codes_around(layer: QuantizedLayer) -> tuple[Tensor, Tensor]:
    """The codes below and above each weight, int32; equal where one is out of range, and in all-zero groups."""
    quantizer, weight = layer.quantizers["weight"], layer.weight.detach()
    below = torch.floor(weight / quantizer.per_element(quantizer.scale, weight)).to(torch.int32)
    below += quantizer.per_element(quantizer.zero_point, weight)
    below, above = (codes.clamp_(quantizer.code_min, quantizer.code_max) for codes in (below, below + 1))
    return below, torch.where(_zeros(quantizer, weight), below, above)


def _neighbours(layer: QuantizedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """The grid's values below and above each weight, and at which share (0 to 1) of the way it lies."""
    quantizer, weight = layer.quantizers["weight"], layer.weight.detach()
    below, above = _codes_around(layer)
    ratio = weight / quantizer.per_element(quantizer.scale, weight)
    share = torch.where(below == above, 0.5, ratio - ratio.floor())  # nothing draws the middle to either side
    return quantizer.decode(below), quantizer.decode(above), share


class LearnedCodes(Learned):
    """Weights whose codes move by learning, straight through their rounding (Bengio et al., 2013, arXiv 1308.3432).

    In codes less the zero point ``W' = s clamp(round(c + V), lowest, highest)``. V starts at 0, where W' is the
    quantized weight of before, and a code moves once V has gathered half a step. So noise moves nothing, and weights
    that are on their grid already, such as those of a compensation, can go either way; LearnedRounding would start at
    one end of the way between two codes.
    V counts steps: a learning rate means the same for every layer. It falls to zero along a cosine.

    Args:
        layers: layers with quantized weights of linear formats; they are left alone until ``write``.

    Attributes:
        values: V, of all weights.
    """

    def __init__(self, layers: list[QuantizedLayer]) -> None:
        self._layers = layers
        columns = zip(*(_codes_and_room(layer) for layer in layers), strict=True)
        self._start, self._most_down, self._most_up, self._scale = (torch.cat(column) for column in columns)  # each [n]
        self.values = torch.zeros_like(self._start).requires_grad_()

    def use(self) -> None:
        """See the base class."""
        with torch.no_grad():  # beyond the ends there is nothing to gather
            self.values.clamp_(self._most_down, self._most_up)
        codes = self._codes() + (self.values - self.values.detach())
        for layer, weight in zip(self._layers, _split_like(codes * self._scale, self._layers), strict=True):
            layer.quantizers["weight"].fixed = weight

    def rate(self, done: float) -> float:
        """See the base class."""
        return _falling(done)

    def write(self) -> None:
        """Put the weights on their grids: exactly what their quantizers decode, so that these give the same codes."""
        for layer, codes in zip(self._layers, _split_like(self._codes(), self._layers), strict=True):
            quantizer = layer.quantizers["weight"]
            zero_point = quantizer.per_element(quantizer.zero_point, layer.weight)
            layer.weight.copy_(quantizer.decode(codes.to(torch.int32) + zero_point))

    def _codes(self) -> Tensor:
        """Codes less the zero point, as floats, [n]; without gradients."""
        return (self._start + self.values.detach().clamp(self._most_down, self._most_up)).round_()


def _codes_and_room(layer: QuantizedLayer) -> tuple[Tensor, ...]:
    """Codes less the zero point, how far they may go down and up, and the scale: the weight's dtype, [weights] each."""
    quantizer, weight = layer.quantizers["weight"], layer.weight.detach()
    zero_point = quantizer.per_element(quantizer.zero_point, weight)
    codes, scale = quantizer.encode(weight), quantizer.per_element(quantizer.scale, weight)
    room = (quantizer.code_min - codes, quantizer.code_max - codes)
    room = (part.masked_fill(_zeros(quantizer, weight), 0) for part in room)
    parts = (codes - zero_point, *room, scale)
    return tuple(part.to(weight.dtype).expand_as(weight).flatten() for part in parts)


def _zeros(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Which weights are of an all-zero group, against the weight: codes of theirs would be steps of any size."""
    return quantizer.per_element(quantizer.zero_groups(weight), weight)


def _split_like(flat: Tensor, layers: list[QuantizedLayer]) -> list[Tensor]:
    """A vector over the weights of all layers as one tensor for each layer, in the shape of its weight."""
    parts = flat.split([layer.weight.numel() for layer in layers])
    return [part.view_as(layer.weight) for part, layer in zip(parts, layers, strict=True)]


def _falling(done: float) -> float:
    """Share of the learning rate after a share ``done`` of the training: a cosine that falls to zero, as QDrop's."""
    return 0.5 * (1 + math.cos(math.pi * done))


class LearnedSteps(Learned):
    """Step sizes of activations, ``s = s0 exp(r)``; zero points stay.

    On this scale a learning rate is a relative change, the same for every quantizer, and steps stay positive. It falls
    to zero along a cosine. A format's bound on its range (MPQ) is kept.

    Args:
        activations: stand-ins for calibrated quantizers of linear formats.

    Attributes:
        values: r, of all groups of all quantizers.
    """

    def __init__(self, activations: list["TrainedActivation"]) -> None:
        self._activations = activations
        quantizers = [a.quantizer for a in activations]
        self._start = torch.cat([q.scale for q in quantizers])  # [n]
        self._least = torch.cat([_least_step(q) for q in quantizers]).div_(self._start).log_()
        self.values = torch.zeros_like(self._start).requires_grad_()

    def use(self) -> None:
        """See the base class."""
        for activation, step in zip(self._activations, self._steps(), strict=True):
            activation.step = step

    def rate(self, done: float) -> float:
        """See the base class."""
        return _falling(done)

    def write(self) -> None:
        """See the base class."""
        for activation, step in zip(self._activations, self._steps(), strict=True):
            activation.quantizer.set_parameters(step, activation.quantizer.zero_point)

    def _steps(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            self.values.copy_(torch.maximum(self.values, self._least))
        return (self._start * self.values.exp()).split([a.quantizer.groups for a in self._activations])


def _least_step(quantizer: Quantizer) -> Tensor:
    """The step size at a format's smallest range factor, [G]; 0 where there is no such bound."""
    if not quantizer.min_factor or quantizer.observed is None:
        return torch.zeros_like(quantizer.scale)
    return quantizer.parameters_for(*quantizer.observed, quantizer.min_factor)[0]


class TrainedActivation(nn.Module):
    """Stands in for an activation's quantizer in training.

    Args:
        quantizer: the one that it stands in for.
        keep_float: probability that an element stays float (QDrop, Wei et al., ICLR 2022); in steps of 1 / 256.
        generator: chooses these elements, on their device.

    Attributes:
        step: step sizes [G] to use instead of the quantizer's own, or None.
    """

    mode = QuantizerMode.QUANTIZE

    def __init__(self, quantizer: Quantizer, keep_float: float, generator: torch.Generator) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.step: Tensor | None = None
        self._keep_float = keep_float
        self._generator = generator

    def forward(self, x: Tensor) -> Tensor:
        """Quantize all elements but those that stay float; differentiable."""
        if self._keep_float == 1:
            return x
        quantized = self.quantizer.fake_quantize(x) if self.step is None else self._quantize(x, self.step)
        if self._keep_float == 0:
            return quantized
        return torch.lerp(x, quantized, self._mask(x))

    def _mask(self, x: Tensor) -> Tensor:
        """1 where an element is quantized, 0 where it stays float; in the dtype of ``x``.

        Eight elements share a random number, a byte each: a number each would take more time than anything else.
        """
        words = torch.empty(x.numel() // 8 + 1, dtype=torch.int64, device=x.device)
        words.random_(-(2**63), None, generator=self._generator)
        kept = min(255, round(256 * self._keep_float))  # a byte holds no 256
        return (words.view(torch.uint8)[: x.numel()] >= kept).view(x.shape).to(x.dtype)

    def _quantize(self, x: Tensor, step: Tensor) -> Tensor:
        quantizer = self.quantizer
        low, high = (bound.to(step.dtype) for bound in quantizer.shifted_bounds)
        return _LearnedStep.apply(x, *(quantizer.per_element(p, x) for p in (step, low, high)))


class _LearnedStep(torch.autograd.Function):
    """Affine fake quantization with a gradient for the step size (LSQ, Esser et al., ICLR 2020, eq. 1 to 3).

    The paper's factor on that gradient is left out: to Adam a constant factor means nothing.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
        ratio = x / step
        rounded = ratio.round()
        codes = torch.minimum(torch.maximum(rounded, low), high)
        inside = rounded.eq_(codes)  # as floats: mixing them with booleans takes twice the time
        slope = torch.sub(codes, ratio.mul_(inside), out=ratio)
        ctx.save_for_backward(inside, slope, step)
        return codes.mul_(step)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inside, slope, step = ctx.saved_tensors
        return grad * inside, (grad * slope).sum_to_size(step.shape), None, None


@contextlib.contextmanager
def trained_activations(
    module: nn.Module, keep_float: float, generator: torch.Generator
) -> Iterator[list[TrainedActivation]]:
    """Context in which stand-ins take the place of a block's activation quantizers; gives the stand-ins."""
    places = [(q, role) for _, layer in quantized_layers(module) for q in [layer.quantizers] for role in q]
    places = [(quantizers, role) for quantizers, role in places if role != "weight"]
    stand_ins = [TrainedActivation(quantizers[role], keep_float, generator) for quantizers, role in places]
    try:
        for (quantizers, role), stand_in in zip(places, stand_ins, strict=True):
            quantizers[role] = stand_in
        yield stand_ins
    finally:
        for (quantizers, role), stand_in in zip(places, stand_ins, strict=True):
            quantizers[role] = stand_in.quantizer
