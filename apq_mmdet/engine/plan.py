"""What a calibration would do, and its cost, about: from operations and bytes of one image, and a measured rate.

Operations are those of matrix products, see counting.py.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from mmengine.dist import get_dist_info
from torch import nn

from apq_mmdet.calibration.blocks import bytes_of, partition
from apq_mmdet.calibration.calibrator import HELD, check_model, evaluating
from apq_mmdet.calibration.distributed import own_images
from apq_mmdet.calibration.importance import CalibrationTask
from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.engine.block_plan import BACKWARD, BlockPlan, plan_block
from apq_mmdet.engine.counting import counting
from apq_mmdet.layers.base import float_only, quantized_layers
from apq_mmdet.layers.state import is_added
from apq_mmdet.quantizers.packing import packed_size

TRANSFORM = 3  # runs of the blocks that find what makes channels even, and the ranges of what was made even
REFIT = 2  # of what MLPs get and give, and of the ranges of what they have become


@dataclass(frozen=True)
class Sizes:
    """Bytes of the weights that become integers, in float32 and as packed codes with scales; and of the whole state."""

    weights_float: int
    weights_packed: int
    state_float: int
    state_packed: int


@dataclass(frozen=True)
class Plan:
    """What a calibration would do.

    Attributes:
        detector: its type.
        images: number of calibration images.
        processes: that calibrate together.
        own: number of images of the first process; no other has more.
        blocks: in the order of execution.
        operations: of one float forward of the detector on one image.
        seconds: that this forward took.
        machine: the device and its threads, in words.
        centered: whether layers take centers off their inputs, which a run of the blocks finds.
        teacher_bytes: outputs of the float detector on one image.
        memory_budget: bytes that calibration may take above the model's own, for each process.
    """

    detector: str
    recipe: Recipe
    images: int
    processes: int
    own: int
    blocks: list[BlockPlan]
    operations: int
    seconds: float
    machine: str
    centered: bool
    teacher_bytes: int
    sizes: Sizes
    memory_budget: int

    @property
    def rate(self) -> float:
        """Operations per second of the float forward."""
        return self.operations / self.seconds

    @property
    def search_operations(self) -> int:
        """Upper bound of the search on all images of all processes."""
        return self.images * sum(block.search_operations for block in self.blocks)

    @property
    def passes(self) -> dict[str, int]:
        """Float forwards that one image takes beside the search and what follows it, by what they are for."""
        recipe, found = self.recipe, {"float pass": 1}
        if recipe.policy.mlp_refit:
            found["refitted MLPs"] = REFIT
        if recipe.equalize:
            found["even channels"] = TRANSFORM
        if self.centered:
            found["input centers"] = 1
        if any(recipe.needs_gradients(block.name) for block in self.blocks):
            found["gradients"] = BACKWARD * (2 if recipe.importance == "perturbation" else 1)
        if recipe.search is not None and recipe.search.block_input == "quantized":
            found["quantized inputs"] = 1
        return found

    @property
    def pass_seconds(self) -> float:
        """Of the passes over the own images."""
        return self.own * sum(self.passes.values()) * self.seconds

    @property
    def search_seconds(self) -> float:
        """Of the operations of the search on the own images, at the rate of the float forward."""
        return self._seconds_at_rate(self.own * sum(block.search_operations for block in self.blocks))

    @property
    def fit_seconds(self) -> float:
        """Of compensation and learning at that rate; every process does all that is not on images."""
        return self._seconds_at_rate(sum(self.own * b.fit_operations + b.fixed_operations for b in self.blocks))

    @property
    def calibration_seconds(self) -> float:
        """Of all that, about."""
        return self.pass_seconds + self.search_seconds + self.fit_seconds

    def _seconds_at_rate(self, operations: int) -> float:
        return operations / self.rate if operations else 0.0

    @property
    def captured_bytes(self) -> int:
        """Captured on the own images."""
        return self.own * (self.teacher_bytes + sum(block.captured_bytes for block in self.blocks))

    @property
    def disk_bytes(self) -> int:
        """Captured on the own images and not held in memory."""
        return max(0, self.captured_bytes - self.memory_budget // HELD)


def make_plan(
    model: nn.Module, images: Sequence[Any], task: CalibrationTask, recipe: Recipe, memory_budget: int
) -> Plan:
    """Run the float model on the first image, and count.

    Args:
        model, images, task, recipe, memory_budget: as for ``calibrate``; the model is left as it was.

    Raises:
        BadInputError: see ``check_model``.
    """
    check_model(model, recipe)
    blocks = partition(model)
    searched = recipe.search is not None  # without a search nothing is captured
    sample = images[0]
    with evaluating(model), torch.no_grad(), float_only(model):
        with counting(model, blocks, keep=searched) as count:
            teacher = task.teacher(model, sample)
        seconds = forward_seconds(model, sample, task)  # the counted forward has warmed up
        order = list(dict.fromkeys([*count.calls, *blocks]))
        # together the calls are large: each block's are let go of
        planned = [plan_block(name, blocks[name], count.calls.pop(name, []), recipe) for name in order]
    return Plan(
        detector=type(model).__name__,
        recipe=recipe,
        images=len(images),
        processes=get_dist_info()[1],
        own=len(own_images(len(images))),
        blocks=planned,
        operations=count.operations,
        seconds=seconds,
        machine=_machine(model),
        centered=any(layer.input_centers is not None for _, layer in quantized_layers(model)),
        teacher_bytes=bytes_of(teacher) if searched else 0,
        sizes=weight_sizes(model),
        memory_budget=memory_budget,
    )


def forward_seconds(model: nn.Module, sample: Any, task: CalibrationTask) -> float:
    """Wall-clock time of one forward; another one should have warmed up."""
    wait = torch.cuda.synchronize if next(model.parameters()).is_cuda else lambda: None
    wait()
    start = time.perf_counter()
    task.teacher(model, sample)
    wait()
    return time.perf_counter() - start


def _machine(model: nn.Module) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, threads: {torch.get_num_threads()}"


def weight_sizes(model: nn.Module) -> Sizes:
    """Bytes of the model's state before and after, without running it."""
    state = model.state_dict()
    parts = {key: bytes_of(value) for key, value in state.items()}
    before = codes = scales = 0
    for _, layer in quantized_layers(model):
        if "weight" in layer.quantizers:
            quantizer = layer.quantizers["weight"]
            before += bytes_of(layer.weight)
            codes += packed_size(layer.weight.numel(), int(quantizer.bits))
            scales += bytes_of(quantizer.state_dict())
    added = sum(size for key, size in parts.items() if is_added(key))
    total = sum(parts.values())
    return Sizes(before, codes + scales, total - added, total - before + codes)


def render_plan(plan: Plan) -> str:
    """The plan as a person reads it."""
    policy = plan.recipe.policy
    shared = f" in {plan.processes} processes, at most {plan.own} each" if plan.processes > 1 else ""
    return "\n".join(
        [
            f"plan: {plan.detector}, recipe {plan.recipe.name}, W{policy.w_bits}A{policy.a_bits}, scope {policy.scope}",
            f"calibration images: {plan.images}{shared}",
            "counted on the first image, for one image; a multiply-accumulate is two operations:",
            "",
            *_table(plan.blocks),
            "",
            *_size_lines(plan.sizes),
            *_time_lines(plan),
            *_memory_lines(plan),
        ]
    )


def _table(blocks: Sequence[BlockPlan]) -> list[str]:
    rows = [("block", "layers", "ranges", "candidates", "operations", "captured", "search at most")]
    for b in blocks:
        rows.append((b.name, *_cells(b)))
    keys = [key.name for key in fields(BlockPlan) if key.name not in ("name", "reached")]
    total = BlockPlan(name="all", reached=True, **{key: sum(getattr(b, key) for b in blocks) for key in keys})
    rows.append((total.name, *_cells(total)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _cells(block: BlockPlan) -> tuple[str, ...]:
    """All columns but the name; with a shortlist, the candidates at the layers -> those that get to the block."""
    candidates = [str(number) for number in (block.ranked, block.judged) if number]
    return (
        str(block.layers),
        str(block.ranges),
        " -> ".join(candidates) or "-",
        _number(block.operations) if block.reached else "not reached",
        _bytes(block.captured_bytes) if block.captured_bytes else "-",
        _number(block.search_operations) if block.search_operations else "-",
    )


def _size_lines(sizes: Sizes) -> list[str]:
    def change(before: int, after: int) -> str:
        return f"{_bytes(before)} -> {_bytes(after)} ({before / max(after, 1):.1f} times smaller)"

    return [
        f"weights in integers: {change(sizes.weights_float, sizes.weights_packed)}, float32 to codes and scales",
        f"with all that stays float32: {change(sizes.state_float, sizes.state_packed)}",
    ]


def _time_lines(plan: Plan) -> list[str]:
    search = plan.recipe.search
    machine = f"{plan.machine}; {_seconds_text(plan.seconds)} a forward, {_number(plan.rate)} operations/s"
    parts = ", ".join(f"{name} {number}" for name, number in plan.passes.items())
    forwards = sum(plan.passes.values())
    passes = f"  passes: {plan.own} images x {forwards} forwards = {_seconds_text(plan.pass_seconds)} ({parts})"
    if search is None:
        return [
            f"search: nothing is searched, activation ranges are those of observer {plan.recipe.observer!r}",
            f"time: about {_seconds_text(plan.pass_seconds)} here ({machine})",
            passes,
        ]
    sampled = [f"{key} = {getattr(search, key)}" for key in ("windows", "rows", "tokens") if getattr(search, key)]
    samples = f", on samples ({', '.join(sampled)})" if sampled else ""
    lines = [
        f"search: at most {_number(plan.search_operations)} operations on {plan.images} images{samples}",
        f"time: about {_seconds_text(plan.calibration_seconds)} here ({machine})",
        passes,
        f"  search: {plan.own} images at that rate = {_seconds_text(plan.search_seconds)}",
    ]
    if plan.fit_seconds:
        fixed = sum(block.fixed_operations for block in plan.blocks)
        operations = f"{_number(fixed + plan.own * sum(block.fit_operations for block in plan.blocks))} operations"
        steps = f"{_number(fixed)} of them however many images there are"
        lines.append(f"  weights: {operations}, {steps}, at that rate = {_seconds_text(plan.fit_seconds)}")
    return [
        *lines,
        "  The search figure is every candidate in every round on the part of its block that it changes, at the rate",
        "  of the float forward. Screening and idle rounds make it less; quantizers and errors, no matrix",
        "  products, make it more, and can outweigh that on small images. Evaluation comes on top.",
    ]


def _memory_lines(plan: Plan) -> list[str]:
    each = " (each process)" if plan.processes > 1 else ""
    budget = f"memory: budget {_bytes(plan.memory_budget)}{each}, 1 / {HELD} of it for captured tensors"
    if not plan.captured_bytes:
        return [f"memory: budget {_bytes(plan.memory_budget)}{each}; nothing is captured"]
    outputs = f"  captured: {_bytes(plan.captured_bytes)} with the detector's outputs"
    return [budget, f"{outputs}, {_bytes(plan.disk_bytes)} of them on disk"]


def _number(value: float) -> str:
    """With three digits and a prefix: 12.3 G."""
    prefix = ""
    for larger in ("k", "M", "G", "T", "P"):
        if value < 999.5:
            break
        value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}".rstrip()


def _bytes(value: float) -> str:
    if value < 1024:
        return f"{value:.0f} B"
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f} {unit}"


def _seconds_text(value: float) -> str:
    for limit, seconds, unit in ((120, 1, "s"), (7200, 60, "min"), (2 * 86400, 3600, "h")):
        if value < limit:
            number = value / seconds
            return f"{number:.2g} {unit}" if number < 10 else f"{number:.0f} {unit}"
    return f"{value / 86400:.1f} days"
