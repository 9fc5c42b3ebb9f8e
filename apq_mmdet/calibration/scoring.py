"""Errors of candidate ranges over all images, and the exact choice of the best one from few full evaluations."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import outputs_of
from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.objectives import Objective
from apq_mmdet.calibration.tape import Replays, flushed_denormals
from apq_mmdet.calibration.units import Batch, UnitCall, batches, rows_of
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers.base import QuantizedLayer

PROBE = 0.02  # share of the units on which they are compared at first
TOGETHER = 8  # candidates that are evaluated in full before the others are compared with the best so far
WORTHWHILE = 0.9  # a screen that is expected to spare less than a tenth of the work is left out
ROUNDING = 1e-3  # relative; sums over differently cut tiles differ by far less
BUFFER_ELEMENTS = 2**26  # of the errors that are held at once, 256 MiB


class Candidate(NamedTuple):
    """What a search tries: a range factor, and the variant of formats that have one."""

    factor: float
    variant: float | None = None


def candidate_errors(
    module: nn.Module,
    calls: Iterable[UnitCall],
    layer: QuantizedLayer,
    role: str,
    candidates: Sequence[Candidate],
    objective: Objective,
) -> list[tuple[int, Tensor]]:
    """Error of ``module``'s output on each call for each candidate of one quantizer.

    Returns:
        (image, float64 [candidates]) of each call, in order.
    """
    quantizer = layer.quantizers[role]
    parameters = [quantizer.parameters_for(*quantizer.observed, *candidate) for candidate in candidates]
    replays = Replays(module, quantizer)
    columns: list[tuple[int, Tensor]] = []
    with flushed_denormals():
        for batch in batches(calls):
            if len(batch.calls) == 1 and not objective.eliminate:
                errors = _summed_by_tile(replays, batch, parameters, objective)
            else:
                errors = _batch_errors(replays, batch, parameters, objective)
            columns += zip((call.image for call in batch.calls), errors.unbind(1), strict=True)
    return columns


def sum_by_image(columns: list[tuple[int, Tensor]], size: int) -> Tensor:
    """Sum of the columns [size] of all calls of all processes in the order of their images, float64."""
    own = [(image, column.cpu().numpy()) for image, column in columns]
    total = np.zeros(size)
    for _, column in sorted((c for part in gather(own) for c in part), key=lambda pair: pair[0]):
        total += column
    return torch.from_numpy(total)


def _summed_by_tile(
    replays: Replays, batch: Batch, parameters: list[tuple[Tensor, ...]], objective: Objective
) -> Tensor:
    """Error of each candidate on the one call of a batch, float64 [candidates, 1], for objectives that drop nothing."""
    total = torch.zeros(len(parameters), 1, dtype=torch.float64, device=batch.stacked.targets.device)
    for start, _, tile in batch.tiles():
        error = torch.empty_like(tile.targets)
        for candidate, outputs in enumerate(_candidate_outputs(replays, start, tile, parameters)):
            total[candidate] += objective(torch.sub(outputs, tile.targets, out=error), tile.grads, tile.targets, 0)
        replays.forget()
    return total


def _batch_errors(replays: Replays, batch: Batch, parameters: list[tuple[Tensor, ...]], objective: Objective) -> Tensor:
    """Error of each candidate on each call of a batch, float64 [candidates, calls].

    The errors of all elements of a call are held at once, because an objective may drop some of them.
    """
    targets = batch.stacked.targets  # [U, E]
    together = min(len(parameters), max(1, BUFFER_ELEMENTS // targets.numel()))
    buffer = targets.new_empty(together, *targets.shape)  # [candidates, U, E]
    chunks = []
    for first in range(0, len(parameters), together):
        some = parameters[first : first + together]
        for start, stop, tile in batch.tiles():
            for error, outputs in zip(buffer, _candidate_outputs(replays, start, tile, some), strict=False):
                torch.sub(outputs, tile.targets, out=error[start:stop])
        chunks.append(_per_call(buffer[: len(some)], batch, objective))
    replays.forget()
    return torch.cat(chunks)


def _per_call(errors: Tensor, batch: Batch, objective: Objective) -> Tensor:
    """Objective of each call of a batch from the errors of its elements, [candidates, U, E] -> [candidates, calls]."""
    per_call, start = [], 0
    for call, length in zip(batch.calls, batch.lengths, strict=True):
        # padding is dropped along with the least errors, being zero; without elimination it costs nothing as it is
        dropped = int(objective.eliminate * call.elements) + int(call.padding.sum()) if objective.eliminate else 0
        stacked = batch.stacked.units(start, start + length)
        rows = errors[:, start : start + length]  # [candidates, units, E]
        per_call.append(torch.stack([objective(row, stacked.grads, stacked.targets, dropped) for row in rows]))
        start += length
    return torch.stack(per_call, 1)


def _candidate_outputs(
    replays: Replays, start: int, tile: UnitCall, parameters: list[tuple[Tensor, ...]]
) -> Iterator[Tensor]:
    """The module's output on the tile that starts at a unit for each candidate, [units, elements]."""
    for output in replays.outputs(parameters, start, tile.args, tile.kwargs):
        yield rows_of(outputs_of(output), len(tile.targets))


@dataclass(frozen=True)
class Choice:
    """The best candidate, and rough errors of all of them, to be expected of the next search as well.

    ``best`` is None where the errors say nothing, because all are the same.
    """

    best: int | None
    expected: Tensor


def best_candidate(
    errors: Callable[[list[int], float], Tensor],
    expected: Tensor,
    eliminate: float,
    masses: dict[float, float],
    name: str,
    bounds: Tensor | None = None,
    told: Callable[[int], object] = lambda left: None,
) -> Choice:
    """The candidate of least error, the first one where several tie; exact.

    Errors are sums of non-negative terms. So what the most important units alone add up to is a lower bound, and a
    candidate whose bound exceeds the full error of another one is out (early abandoning).

    Args:
        errors: (candidates, share of the units) -> their errors, float64; a lower bound for a share below 1.
        expected: rough errors of all candidates up to a common factor, float64; they decide the cost, not the result.
        eliminate: share of an image's elements that the objective drops, whichever they are.
        masses: about which part of a whole error lies in the most important units, by their share.
        name: of the quantizer, for the error.
        bounds: lower bounds of all errors where some are known, float64.
        told: is called with the number of candidates that are still in the running.

    Raises:
        CalibrationError: the error of every candidate is NaN or infinite.
    """
    number = len(expected)
    expected = relative(expected)
    bounds = torch.zeros(number, dtype=torch.float64) if bounds is None else bounds.clone()
    full: dict[int, float] = {}

    def evaluate(candidates: list[int]) -> None:
        for candidate, error in zip(candidates, errors(candidates, 1.0).tolist(), strict=True):
            full[candidate] = error if error == error else float("inf")

    def alive() -> list[int]:
        least = min(full.values(), default=float("inf"))
        left = [c for c in range(number) if c not in full and float(bounds[c]) * (1 - ROUNDING) <= least]
        return sorted(left, key=lambda c: float(expected[c]))

    # a screen that is not well above the share that may be dropped bounds nothing
    masses = {share: mass for share, mass in masses.items() if share > 2 * eliminate}
    screened = False
    while (share := _next_screen(expected[alive()], masses)) is not None:
        if not full:
            evaluate(alive()[:1])
        if left := alive():
            told(len(left))
            bounds[left] = errors(left, share)
            expected[left] = relative(bounds[left])
        masses = {later: mass for later, mass in masses.items() if later > share}
        screened = True
    together = TOGETHER if screened else number
    while left := alive():
        told(len(left))
        evaluate(left[:together])
        together *= 4
    least = min(full.values(), default=float("inf"))
    if least == float("inf"):
        raise CalibrationError(f"{name}: the error of every candidate range is NaN or infinite")
    evaluated = sorted(full)
    expected[evaluated] = relative(torch.tensor([full[c] for c in evaluated], dtype=torch.float64))
    if len(full) == number and max(full.values()) == least:
        return Choice(None, expected)
    return Choice(min(c for c, error in full.items() if error == least), expected)


def relative(errors: Tensor) -> Tensor:
    """Errors over the least one, infinite for NaN; ones where the least one says nothing, being zero or infinite."""
    errors = errors.nan_to_num(nan=float("inf"), posinf=float("inf"))
    return errors / errors.min() if 0 < float(errors.min()) < float("inf") else torch.ones_like(errors)


def _next_screen(expected: Tensor, masses: dict[float, float]) -> float | None:
    """The share on which to screen candidates next at the least work, or None where evaluating all of them is less.

    Work is counted in full evaluations: those on the share, and those of the candidates that it is expected to leave,
    on larger shares first where that spares more.
    """
    number = len(expected)
    if number <= TOGETHER:
        return None
    plans: list[tuple[float, float, float]] = []  # (share, candidates left behind it, work from there on)
    for share, mass in sorted(masses.items(), reverse=True):
        left = float((~(expected * mass > 1)).sum())
        plans.append((share, left, min([left, *(later * left + work for later, _, work in plans)])))
    work = {share: share * number + rest for share, _, rest in plans}
    best = min(work, key=work.__getitem__, default=None)
    return best if best is not None and work[best] < WORTHWHILE * number else None
