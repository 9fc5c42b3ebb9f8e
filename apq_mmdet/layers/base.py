"""What every quantized layer shares: roles, quantizers by role, and the swap from float."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn

from apq_mmdet.errors import BadInputError
from apq_mmdet.layers.integer import exact_in_codes
from apq_mmdet.quantizers import Quantizer, QuantizerMode, quantizer_mode

INPUT_FACTORS, INPUT_CENTERS = "input_factors", "input_centers"  # names of buffers
LayerClass = TypeVar("LayerClass", bound=type["QuantizedLayer"])


class RoleQuantizers(nn.ModuleDict):
    """Quantizers by role; functions that are applied to all modules pass it over.

    mmengine's weight initialisers are such functions, and take every module that has an attribute ``weight`` for a
    layer with weights.
    """

    def apply(self, fn: Callable[[nn.Module], None]) -> "RoleQuantizers":
        """Apply a function to the quantizers, but not to this."""
        for quantizer in self.values():
            quantizer.apply(fn)
        return self


class QuantizedLayer(nn.Module, ABC):
    """Mixin of quantized layers; ``quantizers`` maps tensor roles to quantizers, a missing role stays float.

    A float layer becomes a quantized one by changing its class in place: parameters, their names, hooks and every
    reference to the module stay what they were, so float checkpoints keep loading.

    Attributes:
        input_factors: float32 [input channels], by which the input is divided before anything else, or None. The
            weights are multiplied by them, so that channels of different ranges share one scale and integer codes can
            be multiplied all the same.
        input_centers: float32 [input channels], which are taken off the divided input before it is quantized and put
            on again afterwards, or None. Behind integer codes they are a constant of each output.
    """

    kind: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    quantizers: RoleQuantizers
    input_factors: Tensor | None
    input_centers: Tensor | None

    @abstractmethod
    def role_axis(self, role: str) -> tuple[int, int]:
        """Axis that finer granularities of this role cut, and its size."""

    def quantize(self, role: str, x: Tensor) -> Tensor:
        """Pass ``x`` through the quantizer of ``role``, if that role is quantized; an input is divided first."""
        x = self.divided_input(x) if role == "input" else x
        if role not in self.quantizers:
            return x
        quantizer = self.quantizers[role]
        if role == "input" and self.input_centers is not None and quantizer.mode is QuantizerMode.QUANTIZE:
            centers = self._by_input_channel(self.input_centers, x)
            return quantizer(x - centers) + centers
        return quantizer(x)

    def divided_input(self, x: Tensor) -> Tensor:
        """An input of this layer over its ``input_factors``: what the weights are multiplied with."""
        if self.input_factors is None:
            return x
        return x / self._by_input_channel(self.input_factors, x)

    def _by_input_channel(self, values: Tensor, x: Tensor) -> Tensor:
        """One value for each input channel, to be broadcast against an input ``x``."""
        axis, size = self.role_axis("input")
        shape = [1] * x.dim()
        shape[axis] = size
        return values.view(shape)

    # -- products of integer codes ------------------------------------------------------------------------------

    @property
    def depth(self) -> int | None:
        """Number of products that one output element sums up; None where that differs or codes are not multiplied."""
        return None

    @property
    def has_linear_codes(self) -> bool:
        """Whether all roles are quantized in formats whose codes can be multiplied."""
        return len(self.quantizers) == len(self.roles) and all(q.linear for q in self.quantizers.values())

    def sums_exactly(self, depth: int) -> bool:
        """Whether sums of so many products of codes of the roles' widths are exact."""
        # the buffer `bits` is not read: what reads numbers from buffers cannot be replayed
        return exact_in_codes(depth, *((q.code_max - q.code_min).bit_length() for q in self.quantizers.values()))

    @property
    def codes_are_int8(self) -> bool:
        """Whether codes of all roles less their zero points lie in -128..127, whatever the zero points are."""
        return all(q.symmetric or q.code_max - q.code_min <= 127 for q in self.quantizers.values())

    @property
    def may_take_codes(self) -> bool:
        """Whether the layer gives what it gives for values, but for their rounding, where its quantizers give codes."""
        return self.depth is not None and self.has_linear_codes and self.sums_exactly(self.depth)

    @property
    def takes_codes(self) -> bool:
        """Whether the quantizers give codes at the moment."""
        return len(self.quantizers) == len(self.roles) and all(
            q.mode is QuantizerMode.CODES for q in self.quantizers.values()
        )

    def code_scale(self) -> Tensor:
        """What products of codes are to be multiplied by, [1] or [output channels]."""
        weight, x = self.quantizers["weight"], self.quantizers["input"]
        return weight.per_element(weight.scale, self.weight).flatten() * x.scale


# exact float class -> quantized class; exact, because a subclass may compute something else in its forward
LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {}


def register_layer(*float_classes: type[nn.Module]) -> Callable[[LayerClass], LayerClass]:
    """Class decorator: modules of exactly these classes become the decorated class."""

    def register(cls: LayerClass) -> LayerClass:
        for float_class in float_classes:
            LAYERS[float_class] = cls
        return cls

    return register


def to_quantized(layer: nn.Module, quantizers: dict[str, Quantizer], divided: bool = False) -> QuantizedLayer:
    """Turn a float layer into its quantized class in place and hand it its quantizers.

    Args:
        layer: a float layer of a registered class.
        quantizers: by role.
        divided: whether its input is divided by factors of its channels, which are 1 to begin with.
    """
    layer.__class__ = LAYERS[type(layer)]
    layer.quantizers = RoleQuantizers(quantizers)
    centered = "input" in quantizers and quantizers["input"].centered
    for name, wanted, make in ((INPUT_FACTORS, divided, torch.ones), (INPUT_CENTERS, centered, torch.zeros)):
        channels = make(layer.role_axis("input")[1], device=layer.weight.device) if wanted else None
        layer.register_buffer(name, channels)
    return layer


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLayer]]:
    """(name, layer) of every layer of ``model`` that holds quantizers, in definition order."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLayer) and hasattr(module, "quantizers"):
            yield name, module


def refuse_half_precision(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Calibration needs float32.

    Args:
        layers: (name, layer) of those that are to be calibrated.

    Raises:
        BadInputError: a layer's weights are of half precision.
    """
    for name, layer in layers:
        weight = next(layer.parameters(recurse=False), None)
        if weight is not None and weight.dtype in (torch.float16, torch.bfloat16):
            raise BadInputError(f"layer {name!r} has weights of {weight.dtype}: calibrate in float32 (model.float())")


def quantizers_of(model: nn.Module) -> list[Quantizer]:
    """All quantizers inside ``model``."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


def needs_whole_input(layer: nn.Module) -> bool:
    """Whether codes of one part of an image depend on its other parts, so that a convolution cannot judge it apart."""
    if not isinstance(layer, QuantizedLayer) or layer.kind == "Linear" or "input" not in layer.quantizers:
        return False
    return layer.quantizers["input"].dynamic


def float_only(model: nn.Module) -> AbstractContextManager[None]:
    """Context in which ``model`` computes exactly its float function."""
    return quantizer_mode(quantizers_of(model), QuantizerMode.FLOAT)
