"""The search of range factors: one loop for every layer kind, objective and metric point."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import BlockCall, tensors_of
from apq_mmdet.calibration.objectives import Objective, build_objective
from apq_mmdet.calibration.recipe import SearchConfig
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers.base import QuantizedLayer, float_only, quantized_layers, quantizers_of
from apq_mmdet.quantizers import Quantizer, QuantizerMode


@dataclass
class Slot:
    """One quantizer's place in the search order, and what its last search found.

    ``searched_at`` is the number of changes that the block had seen then: where it has not moved since, searching
    again could only find the same.
    """

    layer_name: str
    layer: QuantizedLayer
    role: str
    factor: float = 1.0
    searched_at: int = -1

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
    block: nn.Module, calls: list[BlockCall], search: SearchConfig, tick: Callable[[str], None]
) -> dict[str, float]:
    """Choose the range factor of every quantizer of a block.

    In the first round a layer joins the quantized ones when its turn comes; the layers after it in the search order
    are still float. From the second round on all are quantized.

    Args:
        block: holds quantizers whose observed ranges are known; they are set to the result.
        calls: float inputs, float outputs and gradients of the block.
        search: grids, rounds, order, objective, metric point.
        tick: called with the name of the quantizer before each search, also of those that are skipped.

    Returns:
        The chosen factor by ``layer.role``.

    Raises:
        CalibrationError: every candidate's error is NaN.
    """
    objective = build_objective(search.objective)
    # candidates are ranked at the module without elimination, which belongs to the block's output
    ranking = objective if search.metric == "module" else type(objective)()
    by_module = record_modules(block, calls) if search.metric == "module" or search.shortlist else {}
    slots = _slots(block, calls, search.order)
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
        quantizer.mode = QuantizerMode.FLOAT
    changes = 0
    for _ in range(search.rounds):
        settled = True
        for slot in slots:
            tick(slot.name)
            for quantizer in slot.layer.quantizers.values():
                changes += quantizer.mode is QuantizerMode.FLOAT
                quantizer.mode = QuantizerMode.QUANTIZE
            if slot.searched_at == changes:
                continue
            settled = False
            before, slot.factor = slot.factor, _best_factor(block, calls, slot, search, objective, ranking, by_module)
            slot.quantizer.set_range_factor(slot.factor)
            # a change of its own does not make a slot's result stale
            changes += slot.factor != before
            slot.searched_at = changes
        if settled:
            break
    for quantizer in quantizers_of(block):
        quantizer.mode = QuantizerMode.QUANTIZE
    return {slot.name: slot.factor for slot in slots}


def _best_factor(
    block: nn.Module,
    calls: list[BlockCall],
    slot: Slot,
    search: SearchConfig,
    objective: Objective,
    ranking: Objective,
    by_module: dict[str, list[BlockCall]],
) -> float:
    factors = search.factors(slot.layer.kind, slot.quantizer.min_factor)
    if search.metric == "module" or 0 < search.shortlist < len(factors):
        errors = candidate_errors(slot.layer, by_module[slot.layer_name], slot, factors, ranking)
        if search.metric == "module":
            return factors[_argmin(errors, slot.name)]
        best = (
            errors.argsort(stable=True)[: search.shortlist].sort().values
        )  # ascending factors: ties as in the exact form
        factors = [factors[i] for i in best.tolist()]
    return factors[_argmin(candidate_errors(block, calls, slot, factors, objective), slot.name)]


def candidate_errors(
    module: nn.Module, calls: list[BlockCall], slot: Slot, factors: list[float], objective: Objective
) -> Tensor:
    """Error of ``module``'s output for each range factor of the slot's quantizer, float64 [candidates].

    Per-image errors are added in the order of the images, however the images are stacked into calls.
    """
    columns: list[tuple[int, Tensor]] = []
    for call in calls:
        with reuse_prefix(module, call, slot.layer):
            per_candidate = []
            for factor in factors:
                slot.quantizer.set_range_factor(factor)
                outputs = tensors_of(module(*call.args, **call.kwargs))
                per_candidate.append(objective(outputs, call.outputs, call.grads, len(call.images)))
        errors = torch.stack(per_candidate)  # [candidates, images]
        columns += zip(call.images, errors.unbind(1), strict=True)
    columns.sort(key=lambda column: column[0])
    total = torch.zeros(len(factors), dtype=torch.float64, device=columns[0][1].device)
    for _, column in columns:
        total += column
    return total


def _argmin(errors: Tensor, name: str) -> int:
    """Index of the least error; the first one where several tie."""
    if not bool(errors.isfinite().any()):
        raise CalibrationError(f"{name}: the error of every candidate range is NaN or infinite")
    errors = errors.nan_to_num(nan=float("inf"))
    return int((errors == errors.min()).nonzero()[0])


def _slots(block: nn.Module, calls: list[BlockCall], order: str) -> list[Slot]:
    """The block's quantizers in search order: layers by execution, within a layer by role."""
    executed: list[nn.Module] = []
    layers = {layer: name for name, layer in quantized_layers(block)}
    handles = [layer.register_forward_pre_hook(lambda m, _: executed.append(m)) for layer in layers]
    try:
        with float_only(block):
            block(*calls[0].args, **calls[0].kwargs)
    finally:
        for handle in handles:
            handle.remove()
    ordered = list(dict.fromkeys(executed))
    if order == "backward":
        ordered.reverse()
    return [Slot(layers[m], m, role) for m in ordered for role in m.roles if role in m.quantizers]


def record_modules(block: nn.Module, calls: list[BlockCall]) -> dict[str, list[BlockCall]]:
    """Float inputs, outputs and output gradients of each quantized layer of a block, one replay per call.

    The gradient at a layer's output is the block output's gradient pulled back through the float block, so only
    block-level tensors ever have to be captured.
    """
    recorded: dict[str, list[BlockCall]] = {name: [] for name, _ in quantized_layers(block)}
    names = {layer: name for name, layer in quantized_layers(block)}
    for call in calls:
        seen: list[tuple[str, tuple[Any, ...], Tensor]] = []

        def hook(module: nn.Module, args: tuple, output: Tensor, seen: list = seen) -> Tensor:
            output = output if output.requires_grad else output.requires_grad_()
            seen.append((names[module], args, output))
            return output.clone()  # what follows may modify it in place

        handles = [layer.register_forward_hook(hook) for layer in names]
        try:
            with torch.enable_grad(), float_only(block), _constant_parameters(block):
                outputs = tensors_of(block(*call.args, **call.kwargs))
        finally:
            for handle in handles:
                handle.remove()
        kept = [(o, g) for o, g in zip(outputs, call.grads, strict=True) if o.requires_grad]
        layer_outputs = [output for _, _, output in seen]
        grads = torch.autograd.grad(
            [o for o, _ in kept], layer_outputs, grad_outputs=[g for _, g in kept], allow_unused=True
        )
        for (name, args, output), grad in zip(seen, grads, strict=True):
            grad = torch.zeros_like(output) if grad is None else grad
            inputs = tuple(a.detach() for a in args)
            recorded[name].append(BlockCall(inputs, {}, [output.detach()], [grad], call.images))
    return recorded


@contextlib.contextmanager
def _constant_parameters(module: nn.Module) -> Iterator[None]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


@contextlib.contextmanager
def reuse_prefix(block: nn.Module, call: BlockCall, target: nn.Module) -> Iterator[None]:
    """Context in which the submodules that ran before ``target`` return their remembered outputs.

    Their inputs and parameters do not change while only ``target`` does, so the block's output is the same to the
    last bit. Left alone are modules that run again after the target has started, and modules whose output is
    modified in place later on.
    """
    remembered = _finished_before(block, call, target) if block is not target else {}
    for module, outputs in remembered.items():
        replay = _Replay([output for output, _ in outputs])
        module.__dict__["forward"] = replay
    try:
        yield
    finally:
        for module in remembered:
            del module.__dict__["forward"]


class _Replay:
    """A stand-in for ``forward`` that returns the remembered outputs in turn, again and again."""

    def __init__(self, outputs: list[Any]) -> None:
        self.outputs = outputs
        self.position = 0

    def __call__(self, *_: Any, **__: Any) -> Any:
        output = self.outputs[self.position]
        self.position = (self.position + 1) % len(self.outputs)
        return output


def _finished_before(
    block: nn.Module, call: BlockCall, target: nn.Module
) -> dict[nn.Module, list[tuple[Any, list[int]]]]:
    finished: dict[nn.Module, list[tuple[Any, list[int]]]] = {}
    started = False
    late: set[nn.Module] = set()

    def on_start(module: nn.Module, _: Any) -> None:
        nonlocal started
        started |= module is target
        if started:
            late.add(module)

    def on_end(module: nn.Module, _: Any, output: Any) -> None:
        if started:
            late.add(module)
        else:
            finished.setdefault(module, []).append((output, [t._version for t in tensors_of(output)]))

    inner = [m for m in block.modules() if m is not block and not isinstance(m, Quantizer)]
    handles = [m.register_forward_pre_hook(on_start) for m in inner]
    handles += [m.register_forward_hook(on_end) for m in inner]
    try:
        block(*call.args, **call.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    # an inner call of a module that is itself remembered is never made in the replay
    chosen = {m: outputs for m, outputs in finished.items() if m not in late and _unmodified(outputs)}
    covered = {child for m in chosen for child in m.modules() if child is not m}
    return {m: outputs for m, outputs in chosen.items() if m not in covered}


def _unmodified(outputs: list[tuple[Any, list[int]]]) -> bool:
    return all(
        t._version == v for output, versions in outputs for t, v in zip(tensors_of(output), versions, strict=True)
    )
