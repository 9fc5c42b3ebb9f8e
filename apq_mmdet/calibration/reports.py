"""What a calibration did, and where its finished blocks are kept."""

from dataclasses import dataclass
from typing import Any, Protocol


class BlockStates(Protocol):
    """Where finished blocks are kept, so that a killed calibration can go on."""

    def load(self, block: str) -> dict[str, Any] | None:
        """``dict(state=, report=)`` of a finished block, its tensors and most of its BlockReport, or None."""

    def save(self, block: str, finished: dict[str, Any]) -> None:
        """Keep a block that has just been finished."""


@dataclass(frozen=True)
class BlockReport:
    """What the calibration of one block did.

    Attributes:
        seconds: wall-clock time of its search, in the run that searched it.
        factors: the range factor that the search chose by layer and role; compensation and reconstruction may have
            changed the range since.
        reconstructions: objective ``before`` and ``after`` each, and whether its result was better and ``kept``.
        resumed: whether an earlier run had finished it.
    """

    block: str
    seconds: float
    factors: dict[str, float]
    reconstructions: list[dict[str, float | bool]]
    resumed: bool


@dataclass(frozen=True)
class CalibrationReport:
    """What a calibration did.

    Attributes:
        left_float: names of the layers that saw no data.
        seconds: wall-clock time, of this run alone.
    """

    blocks: list[BlockReport]
    left_float: list[str]
    seconds: float

    @property
    def earlier_seconds(self) -> float:
        """What an earlier run spent on the blocks that this one did not search again."""
        return sum(block.seconds for block in self.blocks if block.resumed)
