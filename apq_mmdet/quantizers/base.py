"""The quantizer interface: scale and zero point per group of an axis, modes, observed ranges."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.errors import CalibrationError, UncalibratedError
from apq_mmdet.quantizers.observers import Observer, build_observer
from apq_mmdet.registry import QUANTIZERS


class QuantizerMode(Enum):
    """What a quantizer does with the tensors that pass through it."""

    QUANTIZE = "quantize"  # fake-quantize: the normal state
    FLOAT = "float"  # pass through
    OBSERVE = "observe"  # pass through and widen the observed range
    CODES = "codes"  # integer codes less the zero point, as floats: the layer multiplies by the scales afterwards


class Quantizer(nn.Module, ABC):
    """Maps float values to integer codes of ``bits`` bits and back.

    The axis ``axis`` of the tensor, of size D, is cut into ``groups`` equal groups that each have a scale and a
    zero point: 1 group is per tensor, D groups per channel (or per head), 3 groups the three parts of a fused qkv.
    Some formats have one parameter more, the *variant*, which a search picks from the few values in ``variants``.

    Args:
        bits: code width, 2 to 8.
        axis: the grouped axis of the tensors that will come; only dynamic formats look at it where there is one group.
        groups: number of groups G along that axis; must divide its size.
        symmetric: signed codes around zero with ``zero_point`` 0.

    Raises:
        ValueError: ``symmetric`` was asked for, and the format has unsigned codes alone.

    Attributes:
        scale: float32 [G]; zero_point: int32 [G]; bits: uint8 []; calibrated: bool []; format: uint8, the characters
            of ``format_name`` and of whether codes are symmetric; all in the state_dict.
        variant: float32 [G], in the state_dict; of formats with ``variants`` only.
        observer: gathers the range of the data seen; min-max unless ``use_observer`` set another.
        fixed: what is returned instead of quantizing, while a search knows that neither input nor parameters change.
        signed: whether there are symmetric codes.
        lowest: the lowest value that what the format is made for can have.
        source: where that comes from, for messages.
        min_factor: smallest range factor that a search may choose.
        ranged: whether the range factor changes anything; where not, a search need not try more than one.
        roles: the only roles that the format may quantize; empty for all.
        inputs_of: the only kinds of layers whose inputs the format may quantize; empty for all.
        dynamic: whether the grid of a value follows the values around it.
        centered: whether layers take the mean of each channel off what it quantizes.
        linear: whether values are ``(code - zero_point) * scale``, so that layers can multiply codes.
        variants: what a search tries with every range factor; empty for formats without a variant.
        default_variant: the variant where none is asked for.
    """

    signed = True
    lowest = -math.inf
    source = "any tensor"
    min_factor = 0.0
    ranged = True
    roles: tuple[str, ...] = ()
    inputs_of: tuple[str, ...] = ()
    dynamic = False
    centered = False
    linear = False
    variants: tuple[float, ...] = ()
    default_variant: float | None = None

    def __init__(self, bits: int, axis: int = 0, groups: int = 1, symmetric: bool = False) -> None:
        super().__init__()
        if symmetric and not self.signed:
            raise ValueError(f"the {self.format_name()} format has unsigned codes alone: symmetric=True makes no sense")
        self.axis = axis
        self.groups = groups
        self.symmetric = symmetric
        self.code_min = -(2 ** (bits - 1)) if symmetric else 0
        self.code_max = self.code_min + 2**bits - 1
        self.mode = QuantizerMode.QUANTIZE
        self.use_observer("minmax")
        self.fixed: Tensor | None = None
        self._ready = False
        self.register_buffer("scale", torch.ones(groups))
        self.register_buffer("zero_point", torch.zeros(groups, dtype=torch.int32))
        self.register_buffer("bits", torch.tensor(bits, dtype=torch.uint8))
        self.register_buffer("calibrated", torch.tensor(False))
        described = f"{self.format_name()}, {'symmetric' if symmetric else 'asymmetric'}"
        self.register_buffer("format", torch.tensor(list(described.encode()), dtype=torch.uint8))
        if self.variants:
            self.register_buffer("variant", torch.full((groups,), self.default_variant))

    @classmethod
    def format_name(cls) -> str:
        """The name under which the format is registered."""
        return next((name for name, known in QUANTIZERS.module_dict.items() if known is cls), cls.__name__)

    # -- parameters -------------------------------------------------------------------------------------------

    @abstractmethod
    def parameters_for(
        self, low: Tensor, high: Tensor, factor: float, variant: float | None = None
    ) -> tuple[Tensor, ...]:
        """What ``set_parameters`` takes for the range ``factor * [low, high]``, each [G].

        Scale and zero point, and the variant where the format has one; ``variant`` None is the default one.
        """

    def set_parameters(self, scale: Tensor, zero_point: Tensor, variant: Tensor | None = None) -> None:
        """Take these parameters, each [G], and count as calibrated; without ``variant`` that stays what it is."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        if variant is not None:
            self.variant.copy_(variant)
        self.calibrated.fill_(True)
        self._ready = True

    def set_range_factor(self, factor: float, variant: float | None = None) -> None:
        """Calibrate to ``factor`` times the observed range, and to a variant where the format has one.

        Raises:
            CalibrationError: nothing was observed, or NaN, infinity, or values below the lowest possible one.
        """
        seen = self.observed
        if seen is None:
            raise CalibrationError("no data was observed")
        low, high = seen
        if not bool((low.isfinite() & high.isfinite()).all()):
            raise CalibrationError("NaN or infinite values were observed")
        if bool((low < self.lowest).any()):
            raise CalibrationError(
                f"the {self.format_name()} format quantizes {self.source}; values below {self.lowest} were observed"
            )
        self.set_parameters(*self.parameters_for(low, high, factor, variant))

    def reset(self) -> None:
        """Count as not calibrated, in the normal mode."""
        self.calibrated.fill_(False)
        self._ready = False
        self.mode = QuantizerMode.QUANTIZE
        self.fixed = None

    # -- observed range ---------------------------------------------------------------------------------------

    def use_observer(self, kind: str) -> None:
        """Start anew with an observer of this kind.

        Raises:
            ValueError: no such kind.
        """
        self.observer: Observer = build_observer(kind)

    def observe(self, x: Tensor) -> None:
        """Let the observer see the values of ``x``; empty tensors (no RoIs) say nothing."""
        if x.numel() > 0:
            self.observer.observe(self._group_view(x.detach()), self.range_error)

    @property
    def observed(self) -> tuple[Tensor, Tensor] | None:
        """The observed (low, high), each [G], or None."""
        return self.observer.range()

    def forget_observed(self) -> None:
        """Count as not having seen anything."""
        self.observer.load([])

    def range_error(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Squared error of quantizing grouped data to a range, float64 [G]; own parameters stay what they are.

        Args:
            x: [G, n], as observers get it.
            low, high: [G].
        """
        scratch = type(self)(int(self.bits), axis=0, groups=self.groups, symmetric=self.symmetric).to(x.device)
        scratch.set_parameters(*self.parameters_for(low, high, 1.0))
        return (scratch.fake_quantize(x) - x).square().sum(1, dtype=torch.float64)  # [G]

    # -- values -----------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Integer codes of ``x``, int32, in ``code_min..code_max``."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Values of integer codes, in the dtype of ``scale``."""

    @abstractmethod
    def fake_quantize(self, x: Tensor) -> Tensor:
        """``decode(encode(x))``, equal to the last bit; straight-through gradient inside the range."""

    @property
    def shifted_bounds(self) -> tuple[Tensor, Tensor]:
        """Lowest and highest code less the zero point, int32 [G] each; for linear formats."""
        return self.code_min - self.zero_point, self.code_max - self.zero_point

    def shifted_codes(self, x: Tensor) -> Tensor:
        """``encode(x) - zero_point`` in the dtype of ``x``; for linear formats."""
        raise TypeError(f"{type(self).__name__} is no linear format: its codes cannot be multiplied")

    def forward(self, x: Tensor) -> Tensor:
        """Apply the current mode to ``x``."""
        if self.mode is QuantizerMode.FLOAT:
            return x
        if self.mode is QuantizerMode.OBSERVE:
            self.observe(x)
            return x
        if self.fixed is not None:
            return self.fixed
        if not self._ready:
            self._ready = bool(self.calibrated)
            if not self._ready:
                raise UncalibratedError(
                    "a quantizer has no parameters yet: calibrate the model (tools/quantize_det.py) or load a "
                    "quantized checkpoint before running it"
                )
        return self.shifted_codes(x) if self.mode is QuantizerMode.CODES else self.fake_quantize(x)

    # -- shapes -----------------------------------------------------------------------------------------------

    def per_element(self, parameter: Tensor, x: Tensor) -> Tensor:
        """Broadcast a [G] parameter against ``x``."""
        if self.groups == 1:
            return parameter
        size = x.shape[self.axis]
        shape = [1] * x.dim()
        shape[self.axis] = size
        spread = parameter if size == self.groups else parameter.repeat_interleave(size // self.groups)
        return spread.view(shape)

    def zero_groups(self, x: Tensor) -> Tensor:
        """Which groups of ``x`` hold nothing but zeros, bool [G]: their scale has no meaning."""
        return ~self._group_view(x).any(1)

    def _group_view(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return x.reshape(1, -1)
        return x.movedim(self.axis, 0).reshape(self.groups, -1)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start without what a search holds on to."""
        return {**self.__dict__, "fixed": None}

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        bits = (self.code_max - self.code_min).bit_length()  # the buffer holds no number on the device 'meta'
        return f"bits={bits}, {kind}, axis={self.axis}, groups={self.groups}"


@contextmanager
def quantizer_mode(quantizers: Iterable[Quantizer], mode: QuantizerMode) -> Iterator[None]:
    """Put quantizers into ``mode`` for the duration of the context."""
    changed = [(q, q.mode) for q in quantizers]
    for q, _ in changed:
        q.mode = mode
    try:
        yield
    finally:
        for q, before in changed:
            q.mode = before
