"""Errors of candidate ranges over all images, and the exact choice of the best one from few full evaluations."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import tensors_of
from apq_mmdet.calibration.distributed import gather
from apq_mmdet.calibration.objectives import Objective
from apq_mmdet.calibration.replay import reuse_prefix
from apq_mmdet.calibration.units import Batch, UnitCall, batches, rows_of
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers.base import QuantizedLayer

SCREENS = (0.02, 0.1, 0.3)  # shares of a call's units, the most important ones, on which the candidates are screened
TOGETHER = 8  # candidates that are evaluated in full before the others are compared with the best so far
WORTHWHILE = 0.6  # a screening that leaves more than this share of the candidates costs more than it spares
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
    columns: list[tuple[int, Tensor]] = []
    for batch in batches(calls):
        if len(batch.calls) == 1 and not objective.eliminate:
            errors = _summed_by_tile(module, batch, layer, role, parameters, objective)
        else:
            together = max(1, BUFFER_ELEMENTS // batch.stacked.targets.numel())
            chunks = (parameters[start : start + together] for start in range(0, len(parameters), together))
            errors = torch.cat([_batch_errors(module, batch, layer, role, c, objective) for c in chunks])
        columns += zip((call.image for call in batch.calls), errors.unbind(1), strict=True)
    return columns


def sum_by_image(columns: list[tuple[int, Tensor]], candidates: int) -> Tensor:
    """Sum of the columns [candidates] of all calls of all processes in the order of their images, float64."""
    own = [(image, column.cpu().numpy()) for image, column in columns]
    total = np.zeros(candidates)
    for _, column in sorted((c for part in gather(own) for c in part), key=lambda pair: pair[0]):
        total += column
    return torch.from_numpy(total)


def _summed_by_tile(
    module: nn.Module,
    batch: Batch,
    layer: QuantizedLayer,
    role: str,
    parameters: list[tuple[Tensor, ...]],
    objective: Objective,
) -> Tensor:
    """Error of each candidate on the one call of a batch, float64 [candidates, 1], for objectives that drop nothing."""
    total = torch.zeros(len(parameters), 1, dtype=torch.float64, device=batch.stacked.targets.device)
    for _, _, tile in batch.tiles():
        error = torch.empty_like(tile.targets)
        for candidate, outputs in enumerate(_candidate_outputs(module, tile, layer, role, parameters)):
            total[candidate] += objective(torch.sub(outputs, tile.targets, out=error), tile.grads, tile.targets, 0)
    return total


def _batch_errors(
    module: nn.Module,
    batch: Batch,
    layer: QuantizedLayer,
    role: str,
    parameters: list[tuple[Tensor, ...]],
    objective: Objective,
) -> Tensor:
    """Error of each candidate on each call of a batch, float64 [candidates, calls].

    The errors of all elements of a call are held at once, because an objective may drop some of them.
    """
    targets, grads = batch.stacked.targets, batch.stacked.grads  # [U, E]
    errors = targets.new_empty(len(parameters), *targets.shape)  # [candidates, U, E]
    for start, stop, tile in batch.tiles():
        for candidate, outputs in enumerate(_candidate_outputs(module, tile, layer, role, parameters)):
            torch.sub(outputs, tile.targets, out=errors[candidate, start:stop])
    per_call, start = [], 0
    for call, length in zip(batch.calls, batch.lengths, strict=True):
        # padding is dropped along with the least errors, being zero; without elimination it costs nothing as it is
        dropped = int(objective.eliminate * call.elements) + int(call.padding.sum()) if objective.eliminate else 0
        grad, target = (part[start : start + length] for part in (grads, targets))
        rows = errors[:, start : start + length]  # [candidates, units, E]
        per_call.append(torch.stack([objective(row, grad, target, dropped) for row in rows]))
        start += length
    return torch.stack(per_call, 1)


def _candidate_outputs(
    module: nn.Module, tile: UnitCall, layer: QuantizedLayer, role: str, parameters: list[tuple[Tensor, ...]]
) -> Iterator[Tensor]:
    """The module's output for each candidate, [units, elements]."""
    with reuse_prefix(module, tile, layer, role):
        for candidate in parameters:
            layer.quantizers[role].set_parameters(*candidate)
            yield rows_of(tensors_of(module(*tile.args, **tile.kwargs)), len(tile.targets))


@dataclass(frozen=True)
class Choice:
    """The best candidate, and the share of the candidates that a screening left (1 without one)."""

    best: int
    left: float


def best_candidate(
    errors: Callable[[list[int], float], Tensor],
    number: int,
    eliminate: float,
    incumbent: int | None,
    name: str,
    screen: bool = True,
) -> Choice:
    """The candidate of least error, the first one where several tie; exact.

    Errors are sums of non-negative terms. So what the most important units alone add up to is a lower bound, and a
    candidate whose bound exceeds the full error of another one is out (early abandoning).

    Args:
        errors: (candidates, share of the units) -> their errors, float64; a lower bound for a share below 1.
        number: of candidates.
        eliminate: share of an image's elements that the objective drops, whichever they are.
        incumbent: candidate that was best before, or None.
        name: of the quantizer, for the error.
        screen: whether screening is likely to pay; without effect on the result.

    Raises:
        CalibrationError: the error of every candidate is NaN or infinite.
    """
    bounds = torch.zeros(number, dtype=torch.float64)
    full: dict[int, float] = {}

    def evaluate(candidates: list[int]) -> None:
        if not candidates:
            return
        for candidate, error in zip(candidates, errors(candidates, 1.0).tolist(), strict=True):
            full[candidate] = error if error == error else float("inf")

    def alive() -> list[int]:
        least = min(full.values(), default=float("inf"))
        left = [c for c in range(number) if c not in full and float(bounds[c]) * (1 - ROUNDING) <= least]
        return sorted(left, key=lambda c: float(bounds[c]))

    survived = 1.0
    if screen and number > TOGETHER:
        if incumbent is not None:
            evaluate([incumbent])
        # a screen that is not well above the share that may be dropped bounds nothing
        for share in (s for s in SCREENS if s > 2 * eliminate):
            left = alive()
            if not left:
                break
            bounds[left] = errors(left, share)
            if not full:
                evaluate(alive()[:1])
        survived = len(alive()) / number
    together = TOGETHER if survived < 1 else number
    while left := alive():
        evaluate(left[:together])
        together *= 4
    least = min(full.values(), default=float("inf"))
    if least == float("inf"):
        raise CalibrationError(f"{name}: the error of every candidate range is NaN or infinite")
    return Choice(min(c for c, error in full.items() if error == least), survived)
