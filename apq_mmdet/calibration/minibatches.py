"""Minibatches of a block's units, drawn at random from calls that live in the stores of all processes."""

from typing import NamedTuple

import torch
from mmengine.dist import get_dist_info
from torch import Tensor

from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.units import UnitCall, UnitCalls, stacked

CALLS = 4  # that one minibatch comes from: reading calls back from disk is what drawing costs


class _Place(NamedTuple):
    """Where a call is, and how many units it has."""

    image: int
    rank: int
    index: int
    units: int
    separable: bool


class Minibatches:
    """Draws units of the calls of all processes, each with the same probability, with replacement.

    Every process gets the same units, those that a single one would draw. So all learn the same, however many they
    are, at the price that none of them learns faster.

    Args:
        calls: of this process, maybe none.
        batch: number of units.
        generator: on the CPU, in the same state in all processes.
        device: where the units are wanted.
    """

    def __init__(
        self, calls: UnitCalls, batch: int, generator: torch.Generator, device: torch.device | str = "cpu"
    ) -> None:
        self._calls, self._batch, self._generator, self._device = calls, batch, generator, device
        rank = get_dist_info()[0]
        own = [_Place(c.image, rank, index, len(c.targets), c.separable) for index, c in enumerate(calls)]
        self._places = sorted(place for part in gather(own) for place in part)
        self._sizes = torch.tensor([place.units for place in self._places], dtype=torch.float64)

    def draw(self) -> list[UnitCall]:
        """Units stacked as far as their calls allow it; a call that cannot be taken apart comes alone and whole."""
        if not self._places:
            return []
        chosen = torch.multinomial(self._sizes, min(CALLS, self._batch), replacement=True, generator=self._generator)
        places = [self._places[index] for index in chosen.tolist()]
        places = [p for p in places if p.separable] if places[0].separable else places[:1]
        kinds: dict[str, list[UnitCall]] = {}
        for part in self._exchanged(places, [self._units_of(places, position) for position in range(len(places))]):
            kinds.setdefault(part.signature, []).append(part)
        return [stacked(parts) for parts in kinds.values()]

    def _units_of(self, places: list[_Place], position: int) -> Tensor | None:
        """Which units of one of the chosen calls are taken, int64; None for a whole call."""
        if not places[position].separable:
            return None
        share = self._batch // len(places) + (position < self._batch % len(places))
        return torch.randint(places[position].units, (share,), generator=self._generator)

    def _exchanged(self, places: list[_Place], units: list[Tensor | None]) -> list[UnitCall]:
        """The chosen parts, in their order; each comes from the process that has its call."""
        rank, processes = get_dist_info()
        own: dict[int, UnitCall] = {}
        for position, (place, index) in enumerate(zip(places, units, strict=True)):
            if place.rank == rank:
                call = self._calls[place.index]
                part = call if index is None else call.map(lambda t, index=index: t[index.to(t.device)])
                own[position] = part.map(Tensor.cpu) if processes > 1 else part
        parts = {position: part for found in gather(own) for position, part in found.items()}
        return [parts[position].map(lambda t: t.to(self._device)) for position in range(len(places))]
