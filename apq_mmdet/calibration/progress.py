"""What a person sees while a search runs: block, layer, candidates left, time left, memory."""

import math
import time
from typing import Protocol

from tqdm import tqdm

from apq_mmdet.calibration.memory import peak_memory

INTERVAL = 0.5  # seconds between two numbers of candidates that are shown
ITERATIONS = 10  # of learning, which count as one step: about as long as the search of a range of the same block


class Progress(Protocol):
    """Is told what a search does."""

    def quantizer(self, name: str) -> None:
        """The search of a quantizer begins, or is skipped."""

    def stage(self, name: str, steps: int) -> None:
        """What follows the search begins, compensation or reconstruction; it counts as so many steps."""

    def left(self, number: int, what: str) -> None:
        """So many candidates of a search, or iterations of a stage, are left."""


class Silent:
    """Progress that nobody sees."""

    def quantizer(self, name: str) -> None:
        """See Progress."""

    def stage(self, name: str, steps: int) -> None:
        """See Progress."""

    def left(self, number: int, what: str) -> None:
        """See Progress."""


def steps_of(iterations: int) -> int:
    """What so many iterations of learning count as."""
    return math.ceil(iterations / ITERATIONS)


class SearchBar:
    """A progress bar over all that is done to all blocks; as a context.

    Args:
        steps: by block: one for each search of a range, and those of what follows.
        shown: whether this process shows it.
    """

    def __init__(self, steps: dict[str, int], shown: bool) -> None:
        self._steps = steps
        self._bar = tqdm(total=sum(steps.values()), desc="search", unit="step", smoothing=0.05, disable=not shown)
        self._block, self._memory = "", ""
        self._start = self._before = 0  # steps before this block, and before what runs
        self._running, self._drawn = 0, time.monotonic()  # steps of what runs

    def __enter__(self) -> "SearchBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, block: str) -> None:
        """A block begins."""
        self._block, self._start, self._before, self._running = block, self._bar.n, self._bar.n, 0

    def finish(self) -> None:
        """The block is finished, whatever was not needed of it."""
        self._bar.update(self._start + self._steps[self._block] - self._bar.n)

    def skip(self) -> None:
        """An earlier run has finished the block: says nothing of this one's speed."""
        steps = self._steps[self._block]
        self._bar.n += steps
        for name in ("initial", "last_print_n"):  # by which tqdm reckons it
            setattr(self._bar, name, getattr(self._bar, name, 0) + steps)

    def quantizer(self, name: str) -> None:
        """See Progress."""
        self._next(name, 1)

    def stage(self, name: str, steps: int) -> None:
        """See Progress."""
        self._next(name, steps)

    def _next(self, name: str, steps: int) -> None:
        self._bar.update(self._before + self._running - self._bar.n)  # what ran before has ended
        self._before, self._running = self._bar.n, steps
        self._bar.set_description(f"{self._block} {name}", refresh=False)
        peaks = [f"{value / 2**30:.1f} GiB" for value in peak_memory().values() if value is not None]
        self._memory = "peak memory " + " + ".join(peaks)  # of the host, and of the GPU where there is one
        self._draw(self._memory)

    def left(self, number: int, what: str) -> None:
        """See Progress."""
        if time.monotonic() - self._drawn >= INTERVAL:
            if what == "iterations":
                self._bar.update(self._before + self._running - steps_of(number) - self._bar.n)
            self._draw(f"{number} {what} left, {self._memory}")

    def _draw(self, told: str) -> None:
        self._bar.set_postfix_str(told)
        self._drawn = time.monotonic()
