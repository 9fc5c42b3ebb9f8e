"""What a person sees while a search runs: block, layer, candidates left, time left, memory."""

import time
from typing import Protocol

from tqdm import tqdm

from apq_mmdet.calibration.memory import peak_memory

INTERVAL = 0.5  # seconds between two numbers of candidates that are shown


class Progress(Protocol):
    """Is told what a search does."""

    def quantizer(self, name: str) -> None:
        """The search of a quantizer begins, or is skipped."""

    def stage(self, name: str) -> None:
        """What follows the search begins: compensation or reconstruction."""

    def left(self, number: int, what: str) -> None:
        """So many candidates of a search, or iterations of a stage, are left."""


class Silent:
    """Progress that nobody sees."""

    def quantizer(self, name: str) -> None:
        """See Progress."""

    def stage(self, name: str) -> None:
        """See Progress."""

    def left(self, number: int, what: str) -> None:
        """See Progress."""


class SearchBar:
    """A progress bar over all quantizers of all blocks; as a context.

    Args:
        ranges: number of searches by block.
        shown: whether this process shows it.
    """

    def __init__(self, ranges: dict[str, int], shown: bool) -> None:
        self._ranges = ranges
        self._bar = tqdm(total=sum(ranges.values()), desc="search", unit="range", smoothing=0.05, disable=not shown)
        self._block, self._start, self._memory = "", 0, ""
        self._searching, self._drawn = False, time.monotonic()

    def __enter__(self) -> "SearchBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, block: str) -> None:
        """A block begins."""
        self._block, self._start = block, self._bar.n

    def finish(self) -> None:
        """The block is finished, however many of its searches were made."""
        self._searching = False
        self._bar.update(self._start + self._ranges[self._block] - self._bar.n)

    def quantizer(self, name: str) -> None:
        """See Progress."""
        self._describe(name)
        self._searching = True

    def stage(self, name: str) -> None:
        """See Progress."""
        self._describe(name)

    def _describe(self, name: str) -> None:
        self._bar.update(self._searching)  # the one before has ended
        self._searching = False
        self._bar.set_description(f"{self._block} {name}", refresh=False)
        peaks = [f"{value / 2**30:.1f} GiB" for value in peak_memory().values() if value is not None]
        self._memory = "peak memory " + " + ".join(peaks)  # of the host, and of the GPU where there is one
        self._draw(self._memory)

    def left(self, number: int, what: str) -> None:
        """See Progress."""
        if time.monotonic() - self._drawn >= INTERVAL:
            self._draw(f"{number} {what} left, {self._memory}")

    def _draw(self, told: str) -> None:
        self._bar.set_postfix_str(told)
        self._drawn = time.monotonic()
