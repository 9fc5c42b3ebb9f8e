"""The search of range factors: one loop for every layer kind, objective and metric point."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import bytes_of
from apq_mmdet.calibration.objectives import Objective, build_objective
from apq_mmdet.calibration.progress import Progress, Silent
from apq_mmdet.calibration.recipe import SearchConfig
from apq_mmdet.calibration.replay import fixed_weights, layer_calls, layer_runs
from apq_mmdet.calibration.scoring import (
    PROBE,
    TOGETHER,
    Candidate,
    Choice,
    best_candidate,
    candidate_errors,
    relative,
    sum_by_image,
)
from apq_mmdet.calibration.units import SCREENS, UnitCall, UnitCalls
from apq_mmdet.calibration.weight_errors import in_closed_form, weight_errors
from apq_mmdet.layers.base import QuantizedLayer, quantized_layers, quantizers_of
from apq_mmdet.quantizers import Quantizer, QuantizerMode

SILENT = Silent()
UNSEARCHED = Candidate(1.0)


@dataclass
class Slot:
    """One quantizer's place in the search order, and what its last search found.

    ``searched_at`` is the number of changes that had been seen then of what its errors depend on, the block or the
    layer: where that has not moved since, searching again could only find the same. ``expected`` are rough errors of
    the candidates, by their place in the grid.
    """

    layer_name: str
    layer: QuantizedLayer
    role: str
    chosen: Candidate = UNSEARCHED
    searched_at: int = -1
    expected: Tensor | None = None

    @property
    def quantizer(self) -> Quantizer:
        """The quantizer that is searched."""
        return self.layer.quantizers[self.role]

    @property
    def name(self) -> str:
        """``layer.role``."""
        return f"{self.layer_name}.{self.role}".lstrip(".")


@torch.no_grad()
def search_block(
    module: nn.Module, calls: UnitCalls, search: SearchConfig, progress: Progress = SILENT
) -> dict[str, float]:
    """Choose the range factor of every quantizer of a block.

    In the first round a layer joins the quantized ones when its turn comes; the layers after it in the search order
    are still float. From the second round on all are quantized.

    Args:
        module: the block, or its view of units; holds quantizers whose observed ranges are known, which are set to
            the result.
        calls: inputs, float outputs and gradients of this process' images.
        search: grids, rounds, order, objective, metric point.
        progress: is told what is searched.

    Returns:
        The chosen factor by ``layer.role``, and the variant by ``layer.role.variant`` of formats that have one.

    Raises:
        CalibrationError: every candidate's error is NaN.
    """
    runs = layer_runs(module, calls)
    errors = SlotErrors(module, calls, search, runs)
    slots = _slots(module, list(runs), search.order)
    for quantizer in quantizers_of(module):
        quantizer.set_range_factor(1.0)
        quantizer.mode = QuantizerMode.FLOAT
    # of each layer where errors are those of its own output on recorded inputs, else of the whole block
    changes: Counter[QuantizedLayer | None] = Counter()
    for _ in range(search.rounds):
        settled = True
        for slot in slots:
            progress.quantizer(slot.name)
            part = slot.layer if search.metric == "module" else None
            changes[part] += _join(slot.layer)
            if slot.searched_at == changes[part]:
                continue
            settled = False
            with fixed_weights(module, but=slot.quantizer):
                before, slot.chosen = slot.chosen, _best_candidate(errors, slot, search, progress)
            slot.quantizer.set_range_factor(*slot.chosen)
            # a change of its own does not make a slot's result stale
            changes[part] += slot.chosen != before
            slot.searched_at = changes[part]
        if settled:
            break
    errors.drop()
    for quantizer in quantizers_of(module):
        quantizer.mode = QuantizerMode.QUANTIZE
    factors = {slot.name: slot.chosen.factor for slot in slots}
    variants = {f"{s.name}.variant": s.chosen.variant for s in slots if s.chosen.variant is not None}
    return {**factors, **variants}


def _join(layer: QuantizedLayer) -> int:
    """Let a layer compute with quantized operands, in integers where they are exact; the number of changes."""
    mode = QuantizerMode.CODES if layer.may_take_codes else QuantizerMode.QUANTIZE
    changes = sum(quantizer.mode is QuantizerMode.FLOAT for quantizer in layer.quantizers.values())
    for quantizer in layer.quantizers.values():
        quantizer.mode = mode
    return changes


def _best_candidate(errors: "SlotErrors", slot: Slot, search: SearchConfig, progress: Progress) -> Candidate:
    grid = search.candidates(slot.layer.kind, slot.role, slot.quantizer)
    if search.metric != "module" and 0 < search.shortlist < len(grid):
        ranked = errors.at_module(slot, grid, 1.0, errors.ranking).argsort(stable=True)[: search.shortlist]
        grid = [grid[i] for i in ranked.sort().values.tolist()]  # ascending: ties as in the exact form

    def evaluate(candidates: list[int], share: float) -> Tensor:
        return errors.of(slot, [grid[i] for i in candidates], share, errors.objective)

    if in_closed_form(search, slot.layer, slot.role, len(grid)):
        # all at once and without screens: up to a constant these are no sums of non-negative terms
        found = weight_errors(slot.layer, errors.recorded(slot.layer), grid)
        alike = torch.ones(len(grid), dtype=torch.float64)
        return _chosen(best_candidate(lambda some, _: found[some], alike, 0.0, {}, slot.name), grid, slot.quantizer)
    masses, bounds, eliminate = errors.masses(slot), None, errors.objective.eliminate
    if len(grid) <= TOGETHER:
        slot.expected = torch.ones(len(grid), dtype=torch.float64)
    elif slot.expected is None or len(slot.expected) != len(grid):
        probe = errors.of(slot, grid, PROBE, errors.ranking)
        if not eliminate:  # it is a screen already
            bounds, masses = probe, {share: mass for share, mass in masses.items() if share > PROBE}
        slot.expected = (
            1 + (relative(probe) - 1) / 2
        )  # the most important units tell candidates apart more than the others do
    told = partial(progress.left, what="candidates")
    choice = best_candidate(evaluate, slot.expected, eliminate, masses, slot.name, bounds, told)
    slot.expected = choice.expected
    return _chosen(choice, grid, slot.quantizer)


def _chosen(choice: Choice, grid: list[Candidate], quantizer: Quantizer) -> Candidate:
    if choice.best is None:  # inputs are zero, or nothing of the output counts: the observed range is as good as any
        return min(grid, key=lambda c: (abs(c.factor - 1), c.variant != quantizer.default_variant))
    return grid[choice.best]


class SlotErrors:
    """Errors of candidates at the block's or at the layer's output, summed over all images."""

    def __init__(self, module: nn.Module, calls: UnitCalls, search: SearchConfig, runs: dict[str, int]) -> None:
        self.module, self.calls = module, calls
        self._at_layers = search.metric == "module"
        self.objective = build_objective(search.objective)
        # candidates are ranked without elimination, which belongs to the block's output
        kept = {key: value for key, value in search.objective.items() if key not in ("eliminate", "eliminate_by")}
        self.ranking = build_objective(kept)
        self._needs_gradients = self.objective.needs_gradients
        self._runs = {module.get_submodule(name): number for name, number in runs.items()}
        self._layer_calls: dict[QuantizedLayer, UnitCalls] = {}
        self._masses: dict[QuantizedLayer | None, dict[float, float]] = {}  # None: of the block

    def of(self, slot: Slot, candidates: list[Candidate], share: float, objective: Objective) -> Tensor:
        """``at_module`` or ``at_block``, as the search demands."""
        at = self.at_module if self._at_layers else self.at_block
        return at(slot, candidates, share, objective)

    def at_block(self, slot: Slot, candidates: list[Candidate], share: float, objective: Objective) -> Tensor:
        """Float64 [candidates]; a lower bound if only a ``share`` of the units is looked at."""
        calls = (call.first(share) for call in self.calls.most_important(share))
        columns = candidate_errors(self.module, calls, slot.layer, slot.role, candidates, objective)
        return sum_by_image(columns, len(candidates))

    def at_module(self, slot: Slot, candidates: list[Candidate], share: float, objective: Objective) -> Tensor:
        """As ``at_block``, of the layer's own output on its input in the float block."""
        recorded = self.recorded(slot.layer).most_important(share)
        calls = (call.first(share) for call in recorded)
        columns = candidate_errors(slot.layer, calls, slot.layer, slot.role, candidates, objective)
        return sum_by_image(columns, len(candidates))

    def masses(self, slot: Slot) -> dict[float, float]:
        """About which part of a whole error lies in the most important units, by each share that may be a screen."""
        if not self.objective.uses_gradients:
            return {share: share for share in SCREENS}
        layer = slot.layer if self._at_layers else None
        if layer not in self._masses:  # asked of all processes at once, whatever each of them has recorded
            calls = self.calls if layer is None else self.recorded(layer)
            self._masses[layer] = calls.masses()
        return self._masses[layer]

    def recorded(self, layer: QuantizedLayer) -> UnitCalls:
        """The layer's own calls; those of all layers are made and kept at once where there is room for them."""
        if layer not in self._layer_calls:
            self.drop()
            wanted = [found for _, found in quantized_layers(self.module)]
            if self.calls and not self.calls.has_room_for(self._recorded_bytes(self.calls[0], wanted)):
                wanted = [layer]
            self._layer_calls = {found: self.calls.of_layer(index) for index, found in enumerate(wanted)}
            for call in self.calls:
                for found, recorded in self._record(call, wanted):
                    self._layer_calls[found].add(recorded)
        return self._layer_calls[layer]

    def _record(self, call: UnitCall, wanted: list[QuantizedLayer]) -> list[tuple[QuantizedLayer, UnitCall]]:
        runs = sum(self._runs.get(found, 0) for found in wanted)
        return layer_calls(self.module, call, wanted, self._needs_gradients, runs)

    def _recorded_bytes(self, call: UnitCall, wanted: list[QuantizedLayer]) -> int:
        return sum(bytes_of(recorded.tensors()) for _, recorded in self._record(call, wanted))

    def drop(self) -> None:
        """Forget the layers' calls."""
        for calls in self._layer_calls.values():
            calls.drop()
        self._layer_calls = {}


def _slots(module: nn.Module, executed: list[str], order: str) -> list[Slot]:
    """The block's quantizers in search order: layers by execution, then those that never ran; in a layer by role."""
    layers = dict(quantized_layers(module))
    ordered = list(dict.fromkeys([*executed, *layers]))
    if order == "backward":
        ordered.reverse()
    return [
        Slot(name, layers[name], role)
        for name in ordered
        for role in layers[name].roles
        if role in layers[name].quantizers
    ]
