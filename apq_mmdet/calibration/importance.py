"""Importance of output elements: the gradient of a distillation loss at a disturbed point.

The loss of a float model against itself has a gradient of rounding noise, and a search weighted by it picks ranges at
random. The gradient is therefore taken at a disturbed point, and one that is not disturbed, or a gradient that is zero
or not finite, is refused. There are two kinds of disturbance:

* 'disturbed': the model quantized to its observed ranges; the importance is the gradient there.
* 'perturbation': the float model with every weighed block output shifted by +e and by -e; the importance is
  ``|g(+e) - g(-e)|``, a finite difference along e, in units of its mean over a call, so that images weigh alike. This
  is a reconstruction of the importance of APHQ-ViT (Wu et al., CVPR 2025). Its official code for detectors shifts one
  block at a time, every element by the constant 1e-3, under the RPN's loss alone, of which both terms are divided by
  themselves. Here all blocks are shifted at once, so that two backward passes an image do however many blocks there
  are, by random signs times a share of each output's standard deviation, which float32 does not round away.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.dist import is_main_process
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from tqdm import tqdm

from apq_mmdet.calibration.blocks import outputs_of, tensors_of, watch_blocks
from apq_mmdet.calibration.distributed import gather, own_images
from apq_mmdet.calibration.memory import release_freed
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers.base import float_only, quantizers_of

LEAST_DISTURBANCE = 1e-6  # relative; rounding noise of float32 is about 1e-7, 8-bit quantization about 1e-3

GRADIENT_SCALE = 2.0**20  # squares of small gradients stay far from float32 underflow; no argmin changes

PERTURBATION = 0.01  # e in standard deviations of a block's output


class CalibrationTask(ABC):
    """How to run a model on a calibration sample, and how far its outputs are from the float ones."""

    def teacher(self, model: nn.Module, sample: Any) -> tuple[Any, Any]:
        """Raw outputs (a pytree of tensors) of the float model, and what the student needs of the teacher: nothing.

        Each block must be called as often as in one inference.
        """
        return self.student(model, sample, None), None

    @abstractmethod
    def student(self, model: nn.Module, sample: Any, context: Any) -> Any:
        """Raw outputs of the quantized model in the same structure; differentiable."""

    @abstractmethod
    def loss(self, student: Any, teacher: Any, context: Any) -> Tensor:
        """Distance of the outputs, a scalar; each of its terms is normalised by its number of elements."""


class FeatureTask(CalibrationTask):
    """Any module that maps a tensor to tensors: mean squared error relative to each output's power."""

    def teacher(self, model: nn.Module, sample: Any) -> tuple[Any, Any]:
        """See the base class; apart from ``student``, which a subclass may change."""
        return model(_copy(sample)), None

    def student(self, model: nn.Module, sample: Any, context: Any) -> Any:
        """See the base class."""
        return model(_copy(sample))

    def loss(self, student: Any, teacher: Any, context: Any) -> Tensor:
        """See the base class."""
        return feature_loss(student, teacher)


def _copy(sample: Any) -> Any:
    """A sample that a model may change in place: others of its runs are given it, too."""
    return tree_map_only(Tensor, torch.clone, sample)


def feature_loss(student: Any, teacher: Any) -> Tensor:
    """Sum over outputs of ``mean (s - t)^2 / mean t^2``; those that are no floating-point numbers do not count.

    Raises:
        CalibrationError: there is no other.
    """
    terms = [
        F.mse_loss(s, t) / t.square().mean().clamp_min(1e-12)
        for s, t in zip(tensors_of(student), tensors_of(teacher), strict=True)
        if t.numel() and t.is_floating_point()
    ]
    if not terms:
        raise CalibrationError("the model has no output of floating-point numbers that could tell how wrong it is")
    return torch.stack(terms).sum()


ByCall = dict[tuple[str, int], list[Tensor]]  # by block and number of its call, one tensor for each output
Shift = Callable[[Tensor], Tensor]  # what the model goes on with in the place of a block's output


def capture_gradients(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    samples: Sequence[Any],
    task: CalibrationTask,
    store: CaptureStore,
    importance: str = "disturbed",
) -> None:
    """Disturbed passes with their backwards for each image; the importance of block outputs goes to ``store``.

    Args:
        blocks: those whose outputs' importance is wanted, by name, each of which some process has captured; a backward
            goes no further than these.
        store: holds (outputs, context) of each sample from the float pass, and takes the gradients.
        importance: a key of ``IMPORTANCES``.

    Raises:
        CalibrationError: see the module's docstring.
    """
    frozen = [p for p in model.parameters() if p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(False)
    seen = dict.fromkeys(blocks, False)
    try:
        for image in tqdm(own_images(len(samples)), desc="gradients", unit="image", disable=not is_main_process()):
            teacher, context = store.get(("teacher", image))

            def gradients(shift: Shift, image: int = image, teacher: Any = teacher, context: Any = context) -> ByCall:
                return _gradients(model, blocks, samples[image], task, teacher, context, shift)

            found = IMPORTANCES[importance](model, gradients, image)
            _check_calls(blocks, image, store, found)
            for (name, index), grads in found.items():
                seen[name] |= any(bool(g.any()) for g in grads)
                store.add_grads(name, image, index, grads)
            release_freed()
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
    loud = {name for part in gather(seen) for name, found in part.items() if found}
    # a block whose layers were all left float has no errors
    silent = [name for name, block in blocks.items() if name not in loud and quantizers_of(block)]
    if silent:
        raise CalibrationError(
            f"the gradient of the calibration loss is zero at the output of block {silent[0]!r} for every image: "
            f"its errors could not be weighed. If nothing uses that output, leave the block float: "
            f"quant.overrides.z_unused.pattern='re:{re.escape(silent[0])}(\\..*)?' quant.overrides.z_unused.float=True "
            "(rules apply in the order of their names)"
        )


def _disturbed(model: nn.Module, gradients: Callable[[Shift], ByCall], image: int) -> ByCall:
    """The gradient at the model as it is, quantized."""
    return gradients(lambda output: output)


def _perturbation(model: nn.Module, gradients: Callable[[Shift], ByCall], image: int) -> ByCall:
    """``|g(+e) - g(-e)|`` around the float model, of mean 1 in each call."""
    with float_only(model):
        up, down = (gradients(_random_shift(image, sign)) for sign in (1, -1))
    return {key: _of_mean_one([(a - b).abs_() for a, b in zip(up[key], down[key], strict=True)]) for key in up}


def _of_mean_one(tensors: list[Tensor]) -> list[Tensor]:
    """Non-negative tensors in units of the mean of all their elements; as they are where they are all zero."""
    total = sum(t.sum(dtype=torch.float64) for t in tensors)
    if not total:
        return tensors
    mean = total / sum(t.numel() for t in tensors)
    return [t.div_(mean.to(t.dtype)) for t in tensors]


def _random_shift(seed: int, sign: int) -> Shift:
    """Adds ``sign * e`` to one output after the other; the signs of e are the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)

    def shift(output: Tensor) -> Tensor:
        if not output.is_floating_point() or not output.numel():
            return output
        signs = torch.randint(2, output.shape, generator=generator).mul_(2).sub_(1).to(output)
        return output + signs.mul_(sign * PERTURBATION * output.detach().std(unbiased=False))

    return shift


IMPORTANCES: dict[str, Callable[[nn.Module, Callable[[Shift], ByCall], int], ByCall]] = {
    "disturbed": _disturbed,
    "perturbation": _perturbation,
}


def _gradients(
    model: nn.Module,
    blocks: dict[str, nn.Module],
    sample: Any,
    task: CalibrationTask,
    teacher: Any,
    context: Any,
    shift: Shift,
) -> ByCall:
    """Gradients at the block outputs of one pass, in which ``shift`` maps what follows sees of each output."""
    outputs: ByCall = {}

    def see(name: str, args: tuple, kwargs: dict, output: Any) -> Any:
        # the first block's output depends on no parameter that wants a gradient: make it a leaf that does
        tracked = tree_map_only(
            Tensor,
            lambda t: t if t.requires_grad or not t.is_floating_point() else t.requires_grad_(),
            output,
        )
        key = name, sum(1 for block, _ in outputs if block == name)
        outputs[key] = outputs_of(tracked)
        # a copy, because what follows may modify it in place
        return tree_map_only(Tensor, lambda t: shift(t.clone()), tracked)

    with torch.enable_grad(), watch_blocks(blocks, see):
        student = task.student(model, sample, context)
        loss = task.loss(student, teacher, context)
        scaled = loss * GRADIENT_SCALE
    _check_disturbed(student, teacher, loss)
    flat = [t for tensors in outputs.values() for t in tensors]
    # on some images what is weighed may have no say, such as a head without RoIs
    told = torch.autograd.grad(scaled, flat, allow_unused=True) if scaled.requires_grad else [None] * len(flat)
    grads = iter(told)
    result = {
        key: [torch.zeros_like(t) if (grad := next(grads)) is None else grad for t in tensors]
        for key, tensors in outputs.items()
    }
    for (name, _), block_grads in result.items():
        if not all(bool(g.isfinite().all()) for g in block_grads):
            raise CalibrationError(
                f"the gradient of the calibration loss is not finite at the output of block {name!r}"
            )
    return result


def _check_calls(blocks: Iterable[str], image: int, store: CaptureStore, grads: ByCall) -> None:
    for name in blocks:
        before, now = store.number_of_calls(name, image), sum(1 for block, _ in grads if block == name)
        if before != now:
            raise CalibrationError(
                f"block {name!r} ran {before} times in the float pass of image {image}, but {now} times when gradients "
                f"were taken: its outputs and gradients do not belong together"
            )


def _check_disturbed(student: Any, teacher: Any, loss: Tensor) -> None:
    pairs = [(s, t) for s, t in zip(tensors_of(student), tensors_of(teacher), strict=True) if t.is_floating_point()]
    power = sum(float(t.double().square().sum()) for _, t in pairs)
    error = sum(float((s.detach() - t).double().square().sum()) for s, t in pairs)
    if not torch.isfinite(loss):
        raise CalibrationError("the calibration loss is not finite: the model's outputs hold NaN or infinity")
    if error <= LEAST_DISTURBANCE**2 * power:
        raise CalibrationError(
            "the calibration loss was taken at an undisturbed point (the student equals the float model), where its "
            "gradient is zero or rounding noise; quantize the student before taking gradients"
        )
