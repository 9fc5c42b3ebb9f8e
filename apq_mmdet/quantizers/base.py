"""The quantizer interface: scale and zero point per group of an axis, three modes, observed ranges."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum

import torch
from torch import Tensor, nn

from apq_mmdet.errors import CalibrationError, UncalibratedError


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

    Args:
        bits: code width, 2 to 8.
        axis: the grouped axis of the tensors that will come; ignored for one group.
        groups: number of groups G along that axis; must divide its size.
        symmetric: signed codes around zero with ``zero_point`` 0.

    Attributes:
        scale: float32 [G]; zero_point: int32 [G]; bits: uint8 []; signed, calibrated: bool []; all in the state_dict.
        observed: the (lowest, highest) values seen, each [G], or None.
        fixed: what is returned instead of quantizing, while a search knows that neither input nor parameters change.
        min_factor: smallest range factor that a search may choose.
        linear: whether values are ``(code - zero_point) * scale``, so that layers can multiply codes.
    """

    min_factor = 0.0
    linear = False  # whether values are (code - zero_point) * scale, so that layers can multiply codes

    def __init__(self, bits: int, axis: int = 0, groups: int = 1, symmetric: bool = False) -> None:
        super().__init__()
        self.axis = axis
        self.groups = groups
        self.symmetric = symmetric
        self.code_min = -(2 ** (bits - 1)) if symmetric else 0
        self.code_max = self.code_min + 2**bits - 1
        self.mode = QuantizerMode.QUANTIZE
        self.observed: tuple[Tensor, Tensor] | None = None
        self.fixed: Tensor | None = None
        self._ready = False
        self.register_buffer("scale", torch.ones(groups))
        self.register_buffer("zero_point", torch.zeros(groups, dtype=torch.int32))
        self.register_buffer("bits", torch.tensor(bits, dtype=torch.uint8))
        self.register_buffer("signed", torch.tensor(symmetric))
        self.register_buffer("calibrated", torch.tensor(False))

    # -- parameters -------------------------------------------------------------------------------------------

    @abstractmethod
    def parameters_for(self, low: Tensor, high: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        """Scale and zero point, each [G], for the range ``factor * [low, high]``."""

    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take these parameters, each [G], and count as calibrated."""
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self.calibrated.fill_(True)
        self._ready = True

    def set_range_factor(self, factor: float) -> None:
        """Calibrate to ``factor`` times the observed range.

        Raises:
            CalibrationError: nothing was observed.
        """
        if self.observed is None:
            raise CalibrationError("no data was observed")
        self.set_parameters(*self.parameters_for(*self.observed, factor))

    def observe(self, x: Tensor) -> None:
        """Widen the observed range by the values of ``x``; empty tensors (no RoIs) say nothing."""
        if x.numel() == 0:
            return
        grouped = self._group_view(x.detach())  # [G, n]
        low, high = grouped.amin(1), grouped.amax(1)
        if self.observed is not None:
            low = torch.minimum(low, self.observed[0])
            high = torch.maximum(high, self.observed[1])
        self.observed = (low, high)

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
        return parameter.repeat_interleave(size // self.groups).view(shape)

    def _group_view(self, x: Tensor) -> Tensor:
        if self.groups == 1:
            return x.reshape(1, -1)
        return x.movedim(self.axis, 0).reshape(self.groups, -1)

    def extra_repr(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"bits={int(self.bits)}, {kind}, axis={self.axis}, groups={self.groups}"


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
