"""Reconstruction: rounding of weights and step sizes of activations, learned against a block's float output.

AdaRound (ICML 2020), BRECQ (ICLR 2021), QDrop (ICLR 2022), and the losses of APHQ-ViT and FIMA-Q (CVPR 2025) are
settings of it.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import outputs_of
from apq_mmdet.calibration.distributed import gather, take_from_first
from apq_mmdet.calibration.learned import (
    Learned,
    LearnedCodes,
    LearnedRounding,
    LearnedSteps,
    TrainedActivation,
    trained_activations,
)
from apq_mmdet.calibration.minibatches import Minibatches
from apq_mmdet.calibration.replay import fixed_weights
from apq_mmdet.calibration.scoring import sum_by_image
from apq_mmdet.calibration.units import UnitCall, UnitCalls, batches, rows_of
from apq_mmdet.checks import check_choice, check_fields, check_number, check_whole
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers.base import QuantizedLayer, quantized_layers, quantizers_of
from apq_mmdet.policy import check_bits
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode

CHECKED = 50  # iterations between two looks at the parameters and the loss
HOPELESS = 10  # times the loss of the beginning; where so many codes have moved too far, training does not come back


def _squared(error: Tensor, grad: Tensor | None) -> tuple[Tensor, ...]:
    return (error.square().sum(),)


def _hessian(error: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return ((error * grad).square().sum(),)


def _absolute(error: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return ((error.square() * grad.abs()).sum(),)


def _fisher(error: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    return (*_absolute(error, grad), (error * grad).abs().sum(1).square().sum())


# name -> sums of the loss' terms over units, from errors e and gradients g, [U, E] each. The terms count alike.
# All but 'none' need gradients.
WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "none": _squared,  # AdaRound, QDrop
    "hessian": _hessian,  # BRECQ, eq. 10: the diagonal of the empirical Fisher matrix
    "absolute": _absolute,  # APHQ-ViT, where g is the change of the gradient under a perturbation
    # FIMA-Q: diagonal plus low rank, here of rank one for each unit, (abs(g) . abs(e))^2; absolute as in its code
    "fisher": _fisher,
}


ROUNDINGS = ("adaround", "straight_through")


@dataclass(frozen=True)
class ReconstructionConfig:
    """How a block is reconstructed.

    Args:
        rounding: how roundings are learned: 'adaround', softly between the two nearest codes, of which a regulariser
            picks one; or 'straight_through', codes that move by whole steps, for weights on their grids already.
        max_bits: a block none of whose weights has so few bits stays as it is, to save the time where learning gains
            little; None for every block.
        weighting: what an output's squared error counts by: 'none', 'hessian' (g^2), 'absolute' (abs(g)), or 'fisher'
            (abs(g) and a matrix of rank one for each unit).
        iterations: training steps.
        batch: units (windows, patches, RoIs) in each of them; where a call cannot be taken apart, one whole call.
        keep_float: probability that an element of an activation stays float in a step (QDrop: 0.5); 0 for none.
        rounding_lr: Adam's learning rate of the rounding variables; 0 leaves weights as they are.
        step_lr: Adam's learning rate of the logarithms of activation steps; 0 leaves them as they are.
        rounding_weight: weight of AdaRound's regulariser that ends the softness of roundings; the loss starts at 1.
    """

    rounding: str = "adaround"
    max_bits: int | None = None
    weighting: str = "hessian"
    iterations: int = 1000
    batch: int = 32
    keep_float: float = 0.5
    rounding_lr: float = 1e-2
    step_lr: float = 2e-3
    rounding_weight: float = 0.01

    @property
    def needs_gradients(self) -> bool:
        """Whether errors are weighed by gradients."""
        return self.weighting != "none"

    @classmethod
    def from_dict(cls, config: dict[str, Any], where: str) -> "ReconstructionConfig":
        """Validate; BadInputError names the key."""
        config = check_fields(config, cls, where, "dict(weighting=..., ...) or None")
        if "weighting" in config:
            check_choice(config["weighting"], WEIGHTINGS, f"{where}.weighting")
        if "rounding" in config:
            check_choice(config["rounding"], ROUNDINGS, f"{where}.rounding")
        if config.get("max_bits") is not None:
            check_bits(config["max_bits"], f"{where}.max_bits")
        for key in ("iterations", "batch"):
            check_whole(config.get(key, 1), f"{where}.{key}", 1)
        for key, most in (("keep_float", 1.0), ("rounding_lr", 1.0), ("step_lr", 1.0), ("rounding_weight", math.inf)):
            check_number(config.get(key, 0), f"{where}.{key}", most)
        made = cls(**config)
        if not made.rounding_lr and not made.step_lr:
            raise BadInputError(f"{where}: nothing is learned with rounding_lr=0 and step_lr=0")
        return made


def worth_reconstructing(module: nn.Module, config: ReconstructionConfig) -> bool:
    """Whether a block has what a stage learns, and weights of as few bits as it asks for."""
    layers = _with_weight(module)
    roles = [(role, q) for _, layer in quantized_layers(module) for role, q in layer.quantizers.items() if q.linear]
    weights = bool(config.rounding_lr) and any(role == "weight" for role, _ in roles)
    steps = bool(config.step_lr) and any(role != "weight" for role, _ in roles)
    few = config.max_bits is None or any(int(q.quantizers["weight"].bits) <= config.max_bits for q in layers)
    return few and (weights or steps)


@torch.no_grad()
def reconstruct(
    module: nn.Module,
    calls: UnitCalls,
    config: ReconstructionConfig,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, float | bool]:
    """Learn the rounding of a block's weights and the step sizes of its activations.

    Weights end on their quantizers' grids, so that quantizing them again changes no bit. The result is kept if it
    lowers the objective over all units with hard rounding and everything quantized; else all is as it was before.
    Training ends early where its loss has grown to HOPELESS times that of the beginning.
    Formats that are not linear keep their parameters, and so do zero points.

    In a distributed run every process trains on the same units, which come from the images of all, and ends with what
    a single process gives. The result is the same again for the same seed and threads on a CPU.

    Args:
        module: the block, or its view of units; its quantizers are calibrated.
        calls: inputs, float outputs and gradients of this process' images.
        config: what is learned, and how.
        seed: of the minibatches and of what stays float.
        progress: is told every now and then how many iterations are left.

    Returns:
        ``before`` and ``after``: the objective per unit; of several terms, which count alike, in units of the first.
        Where training ended early, ``after`` is that of its last units.
        ``kept``: whether the result was better and is in place.

    Raises:
        CalibrationError: the objective or a learned value is NaN or infinite; the block is as it was before.
    """
    with quantizer_mode(quantizers_of(module), QuantizerMode.QUANTIZE):
        terms = _mean_terms(module, calls, config.weighting)
        before = float(terms[0])
        if not bool(torch.isfinite(terms).all()):
            raise CalibrationError(_not_finite(module, f"the objective is {before} before any learning"))
        if before == 0:  # nothing can be better than an exact output
            return {"before": before, "after": before, "kept": False}
        balance = torch.where(terms > 0, 1 / terms, 0) / (terms > 0).sum()  # the loss starts at 1
        restore = _restorer(module)
        after = math.inf
        try:
            grown = _train(module, calls, config, balance, seed, progress)
            after = before * (grown or float(_mean_terms(module, calls, config.weighting) @ balance))
        finally:
            if not after < before:
                restore()
    if not math.isfinite(after):
        raise CalibrationError(_not_finite(module, f"the objective is {after} after reconstruction"))
    return {"before": before, "after": after, "kept": after < before}


def _mean_terms(module: nn.Module, calls: UnitCalls, weighting: str) -> Tensor:
    """The terms of the loss over all units of all processes, per unit, float64 [terms]."""
    columns = []
    with fixed_weights(module):
        for batch in batches(calls):
            sums = sum(_terms(module, tile, weighting).double() for _, _, tile in batch.tiles())
            units = sums.new_tensor([len(batch.stacked.targets)])
            columns.append((batch.calls[0].image, torch.cat([sums, units])))
    terms = len(WEIGHTINGS[weighting](torch.zeros(1, 1), torch.zeros(1, 1)))
    *total, units = sum_by_image(columns, terms + 1)
    return torch.stack(total) / units


def _terms(module: nn.Module, call: UnitCall, weighting: str) -> Tensor:
    """The terms of the loss, summed over the units of a call, [terms]."""
    outputs = rows_of(outputs_of(module(*call.args, **call.kwargs)), len(call.targets))  # [U, E]
    return torch.stack(WEIGHTINGS[weighting](outputs - call.targets, call.grads))


def _train(
    module: nn.Module,
    calls: UnitCalls,
    config: ReconstructionConfig,
    balance: Tensor,
    seed: int,
    progress: Callable[[int], None] | None,
) -> float | None:
    """Learn, and write what was learned into the block.

    Args:
        balance: factors of the loss' terms, [terms], which make it start at 1.

    Returns:
        None; where the loss has become hopeless, and nothing was written, its mean over the last steps.
    """
    device = next(q.scale.device for q in quantizers_of(module))
    minibatches = Minibatches(calls, config.batch, torch.Generator().manual_seed(seed), device)
    generator = torch.Generator(device).manual_seed(seed)
    balance = balance.to(device)
    with fixed_weights(module), trained_activations(module, config.keep_float, generator) as activations:
        learned = _learned(module, activations, config)
        optimizer = torch.optim.Adam([{"params": [part.values], "lr": lr} for part, lr in learned])
        parts = [part for part, _ in learned]
        recent: list[Tensor] = []  # losses since the last look
        for iteration in range(config.iterations):
            minibatch = minibatches.draw()
            with torch.enable_grad():
                for part in parts:
                    part.use()
                terms = (_terms(module, call, config.weighting) for call in minibatch)
                loss = sum(t @ balance.to(t.dtype) for t in terms)
            units = sum(len(call.targets) for call in minibatch)
            recent.append(loss.detach() / units)
            _step(optimizer, learned, loss, units, iteration / config.iterations)
            left = config.iterations - 1 - iteration
            if left % CHECKED == 0:
                _check(module, parts, left)
                if progress is not None:
                    progress(left)
                mean = gather(torch.stack(recent).mean().cpu())[0]  # of the first process: all go the same way
                if mean > HOPELESS:
                    return float(mean)
                recent.clear()
    for part in parts:
        take_from_first([part.values])
        part.write()
    return None


def _learned(
    module: nn.Module, activations: list[TrainedActivation], config: ReconstructionConfig
) -> list[tuple[Learned, float]]:
    """What is learned, with learning rates."""
    layers = [layer for layer in _with_weight(module) if layer.quantizers["weight"].linear]
    linear = [a for a in activations if a.quantizer.linear]
    learned: list[tuple[Learned, float]] = []
    if layers and config.rounding_lr:
        soft = config.rounding == "adaround"
        rounding = LearnedRounding(layers, config.rounding_weight) if soft else LearnedCodes(layers)
        learned.append((rounding, config.rounding_lr))
    if linear and config.step_lr:
        learned.append((LearnedSteps(linear), config.step_lr))
    if not learned:
        raise CalibrationError("reconstruction has nothing to learn: no weight or activation of the block is linear")
    return learned


def _step(
    optimizer: torch.optim.Optimizer, learned: list[tuple[Learned, float]], loss: Tensor, units: int, done: float
) -> None:
    """One step of the optimizer along the mean gradient of the units."""
    values = [part.values for part, _ in learned]
    grads: tuple[Tensor | None, ...] = (None,) * len(values)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, values, allow_unused=True)
    grads = tuple(torch.zeros_like(v) if g is None else g for v, g in zip(values, grads, strict=True))
    for group, (part, lr), grad in zip(optimizer.param_groups, learned, grads, strict=True):
        part.values.grad = grad / units + part.own_grad(done)
        group["lr"] = lr * part.rate(done)
    optimizer.step()


def _check(module: nn.Module, parts: list[Learned], left: int) -> None:
    if not all(bool(torch.isfinite(part.values).all()) for part in parts):
        raise CalibrationError(
            _not_finite(module, f"values that are learned are not finite, {left} iterations before the end")
        )


def _not_finite(module: nn.Module, what: str) -> str:
    """An error message that names the layers to blame, if there are such."""
    named = [(name, p) for name, p in module.named_parameters() if not bool(torch.isfinite(p).all())]
    blamed = ", ".join(name for name, _ in named) or "the block's inputs, float outputs or gradients"
    return f"reconstruction: {what}; look for NaN or infinite values in {blamed}"


def _with_weight(module: nn.Module) -> list[QuantizedLayer]:
    """The layers whose weights are quantized."""
    return [layer for _, layer in quantized_layers(module) if "weight" in layer.quantizers]


def _restorer(module: nn.Module) -> Callable[[], None]:
    """A function that gives weights and quantizers back what they hold now."""
    weights = [layer.weight for layer in _with_weight(module)]
    kept = [(tensor, tensor.clone()) for tensor in (*weights, *(q.scale for q in quantizers_of(module)))]

    def restore() -> None:
        for tensor, before in kept:
            tensor.copy_(before)

    return restore
