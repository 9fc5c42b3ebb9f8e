"""Minibatches of a block's units, drawn at random from calls that live in a store."""

import torch

from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.units import UnitCall, UnitCalls, stacked

CALLS = 4  # that one minibatch comes from: reading calls back from disk is what drawing costs


class Minibatches:
    """Draws units of this process, each with the same probability, with replacement.

    Several processes share a minibatch in proportion to their units, at least one each.

    Args:
        calls: of this process, maybe none.
        batch: number of units, of all processes together.
        generator: on the CPU.
    """

    def __init__(self, calls: UnitCalls, batch: int, generator: torch.Generator) -> None:
        self._calls = calls
        self._generator = generator
        self._sizes = torch.tensor([len(call.targets) for call in calls], dtype=torch.float64)
        own = int(self._sizes.sum())
        total = sum(gather(own))  # every process takes part, also one without units
        self._batch = max(1, round(batch * own / total)) if own else 0

    def draw(self) -> list[UnitCall]:
        """Units stacked as far as their calls allow it; a call that cannot be taken apart comes alone and whole."""
        if not self._batch:
            return []
        chosen = torch.multinomial(self._sizes, min(CALLS, self._batch), replacement=True, generator=self._generator)
        drawn = [self._calls[index] for index in chosen.tolist()]
        if not drawn[0].separable:
            return drawn[:1]
        parts: dict[str, list[UnitCall]] = {}
        separable = [call for call in drawn if call.separable]
        for position, call in enumerate(separable):
            units = self._batch // len(separable) + (position < self._batch % len(separable))
            index = torch.randint(len(call.targets), (units,), generator=self._generator)
            parts.setdefault(call.signature, []).append(call.map(lambda t, index=index: t[index.to(t.device)]))
        return [stacked(part) for part in parts.values()]
