"""Observers: how the range of a tensor follows from the data of all calls.

What a call tells is an *entry*, one small tensor. A range depends on the entries but not on their order, so the
entries of several processes can be put together as they come.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

# (x [G, n], low [G], high [G]) -> squared error [G] of quantizing x to that range
RangeError = Callable[[Tensor, Tensor, Tensor], Tensor]


class Observer(ABC):
    """Gathers entries and turns them into a range.

    Attributes:
        entries: what was seen so far; to be changed by ``observe`` and ``load`` only.
    """

    def __init__(self) -> None:
        self.entries: list[Tensor] = []
        self._range: tuple[Tensor, Tensor] | None = None

    def observe(self, x: Tensor, error: RangeError) -> None:
        """Take note of one call.

        Args:
            x: grouped data [G, n], n > 0.
            error: error of quantizing data to a range.
        """
        self.load([*self.entries, self.entry_of(x, error)])

    def end_image(self) -> None:  # noqa: B027  (not all of them tell calls and images apart)
        """What has been seen since the last image ended, in one call or in several, is that of one image."""

    def load(self, entries: list[Tensor]) -> None:
        """Forget what was seen and take these entries, of observers of the same kind, instead."""
        self.entries = entries
        self._range = None

    def range(self) -> tuple[Tensor, Tensor] | None:
        """The (low, high) that the entries amount to, each [G], or None if nothing was seen."""
        if self._range is None and self.entries:
            self._range = self.range_of(torch.stack(self.entries))
        return self._range

    @abstractmethod
    def entry_of(self, x: Tensor, error: RangeError) -> Tensor:
        """The entry of one call; arguments as of ``observe``."""

    @abstractmethod
    def range_of(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """(low, high), each [G], of stacked entries [entries, ...]."""


class MinMaxObserver(Observer):
    """The lowest and the highest value of all calls; an entry is [2, G]."""

    def load(self, entries: list[Tensor]) -> None:
        """See the base class; one entry is enough for all."""
        super().load([torch.stack(self.range_of(torch.stack(entries)))] if entries else [])

    def entry_of(self, x: Tensor, error: RangeError) -> Tensor:
        """See the base class."""
        return torch.stack([x.amin(1), x.amax(1)])

    def range_of(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return entries[:, 0].amin(0), entries[:, 1].amax(0)


class PercentileObserver(Observer):
    """Quantiles of each image, the mean over the images being the range.

    The candidates are the quantiles p of 0.999, 0.9999 and 0.99999 with 1 - p (the minimum where no value is
    negative). Per group that p wins whose ranges quantize the calls' own data with the least squared error, summed
    over the calls; of equal ones the smallest. (RepQ-ViT, ICCV 2023, picks p so on its one calibration batch.)
    Several calls of an image, such as those of a head that runs on each level of a pyramid, have the widest quantiles
    of them. Where a value is NaN or infinite, so is the range NaN.

    An entry is float64 [3, P, G]: lows, highs and errors for each of the P tails.
    """

    tails = (1e-3, 1e-4, 1e-5)  # 1 - p

    def __init__(self) -> None:
        super().__init__()
        self._ended = 0  # entries of images that have ended

    def observe(self, x: Tensor, error: RangeError) -> None:
        """See the base class."""
        ended = self._ended
        super().observe(x, error)
        self._ended = ended

    def load(self, entries: list[Tensor]) -> None:
        """See the base class; these are of images that have ended."""
        super().load(entries)
        self._ended = len(entries)

    def end_image(self) -> None:
        """See the base class."""
        if len(self.entries) > self._ended + 1:
            calls = torch.stack(self.entries[self._ended :])  # [calls, 3, P, G]
            merged = torch.stack([calls[:, 0].amin(0), calls[:, 1].amax(0), calls[:, 2].sum(0)])
            self.load([*self.entries[: self._ended], merged])
        else:
            self._ended = len(self.entries)

    def entry_of(self, x: Tensor, error: RangeError) -> Tensor:
        """See the base class."""
        lows, highs = -self._upper_quantiles(-x), self._upper_quantiles(x)  # [P, G]
        lowest = x.amin(1)
        lows = torch.where(lowest >= 0, lowest, lows)
        # a quantile does not tell of a few values that are NaN or infinite
        unfit = ~(lowest.isfinite() & x.amax(1).isfinite())
        lows, highs = lows.masked_fill(unfit, math.nan), highs.masked_fill(unfit, math.nan)
        errors = [error(x, low, high) for low, high in zip(lows, highs, strict=True)]
        return torch.stack([lows.double(), highs.double(), torch.stack(errors).double()])

    def range_of(self, entries: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        images = len(entries)
        columns = entries.reshape(images, -1).T.tolist()
        sums = entries.new_tensor([math.fsum(column) for column in columns])  # exact, so that the order is free
        lows, highs, errors = sums.view(entries.shape[1:])  # [P, G]
        best = errors.argmin(0, keepdim=True)  # [1, G]
        low, high = (ends.gather(0, best)[0] / images for ends in (lows, highs))
        return low.float(), high.float()

    def _upper_quantiles(self, x: Tensor) -> Tensor:
        """Linearly interpolated quantiles 1 - tail of each row of x [G, n], [P, G].

        Only the tail is sorted; torch.quantile sorts everything and takes no more than 2^24 values.
        """
        last = x.shape[1] - 1
        sorted_tail = x.topk(min(int(max(self.tails) * last) + 2, last + 1)).values  # [G, m], falling
        quantiles = []
        for tail in self.tails:
            whole = int(tail * last)
            above, below = sorted_tail[:, whole], sorted_tail[:, min(whole + 1, last)]
            quantiles.append(torch.lerp(above, below, tail * last - whole))
        return torch.stack(quantiles)


OBSERVERS: dict[str, type[Observer]] = {"minmax": MinMaxObserver, "percentile": PercentileObserver}


def build_observer(kind: str) -> Observer:
    """A fresh observer.

    Raises:
        ValueError: no such kind.
    """
    if kind not in OBSERVERS:
        raise ValueError(f"unknown observer {kind!r}; known: {', '.join(OBSERVERS)}")
    return OBSERVERS[kind]()
