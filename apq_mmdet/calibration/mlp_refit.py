"""The refit of an MLP whose GELU has become a ReLU: both linear layers learn what the MLP gave before.

APHQ-ViT's MLP reconstruction (Wu et al., CVPR 2025, arXiv 2504.02508): the squared error of the output, plus twice that
of the output on hidden values clipped at a quantile, so that a few large ones do not take the range. The official code
weighs errors by its importance and takes 20,000 steps; here they are not weighed, and the steps are fewer and longer.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import hooked
from apq_mmdet.calibration.distributed import gather, take_from_first
from apq_mmdet.calibration.minibatches import Minibatches
from apq_mmdet.calibration.objectives import order_statistic
from apq_mmdet.calibration.transforms import observe_anew, run_images
from apq_mmdet.calibration.units import UnitCall, UnitCalls
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers.base import float_only
from apq_mmdet.layers.mlp_refit import Mlp, replaceable_mlps

STEPS = 1000
BATCH = 512  # tokens in each
TOKENS = 1024  # of each run on an image, from which they are drawn
LEARNING_RATE = 1e-3  # of Adam, which falls to zero as half a cosine
QUANTILE = 0.999  # of positive hidden values, where they are clipped
CLIPPED_WEIGHT = 2.0


@torch.no_grad()
def refit_mlps(block: nn.Module, module: nn.Module, calls: UnitCalls, seed: int) -> None:
    """Replace and refit every MLP of a block that may be, and observe the ranges of its two layers anew.

    In a distributed run every process calls this and ends with what a single process gives.

    Args:
        block: its weights are changed in place; an MLP that runs in no call of any process stays as it is.
        module: its view of units, or itself; maps the calls' inputs to their outputs.
        calls: float inputs on this process' images.
        seed: of the tokens that are drawn.

    Raises:
        CalibrationError: an MLP's inputs or outputs are NaN or infinite.
    """
    mlps = replaceable_mlps(block)
    # all before the first is changed: what one gives may be what another gets
    samples = [_record(module, mlp, calls, calls.of_layer(index), seed) for index, (_, mlp, _) in enumerate(mlps)]
    operands = []
    for (name, mlp, activation), (tokens, largest) in zip(mlps, samples, strict=True):
        if sum(gather(len(tokens))):
            _fit(name, mlp, tokens, largest, seed)
            activation.replace()
            operands += [(mlp.first, "weight"), (mlp.second, "input"), (mlp.second, "weight")]
        tokens.drop()
    if operands:
        with float_only(block):
            observe_anew(operands, lambda: run_images(block, module, calls))


def refit_operations(block: nn.Module) -> int:
    """Those of the training of all MLPs of a block, however many images there are."""
    total = 0
    for _, mlp, _ in replaceable_mlps(block):
        # forward and weight gradients; the second layer twice, with clipped inputs too, and with their gradients
        total += 2 * mlp.first.weight.numel() + 6 * mlp.second.weight.numel()
    return 2 * STEPS * BATCH * total


def _record(module: nn.Module, mlp: Mlp, calls: UnitCalls, tokens: UnitCalls, seed: int) -> tuple[UnitCalls, float]:
    """A sample of the MLP's inputs and of what it gives with its GELU.

    Returns:
        ``tokens``, with a sample of every run on this process' images; and the largest hidden value that is not
        clipped: the mean, over all runs on all images, of the quantile.
    """
    seen: list[Tensor] = []
    quantiles: list[tuple[int, float]] = []  # (image, quantile)
    # clones: what follows may modify them in place
    hooks = (
        mlp.first.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())),
        mlp.second.register_forward_hook(lambda _, args, output: seen.extend((args[0].clone(), output.clone()))),
    )
    with hooked(hooks), float_only(module):
        for call in calls:
            seen.clear()
            module(*call.args, **call.kwargs)
            for x, hidden, y in zip(*(iter(seen),) * 3, strict=True):
                x, y = x.flatten(0, -2), y.flatten(0, -2)  # [tokens, channels]
                padding = torch.zeros(len(x), dtype=torch.int64, device=x.device)
                made = UnitCall((x,), {}, y, None, padding, call.image, y.numel(), separable=True)
                tokens.add(made.sampled(TOKENS, seed))
                positive = hidden[hidden > 0]
                if len(positive):
                    place = math.ceil(QUANTILE * len(positive)) - 1
                    quantiles.append((call.image, float(order_statistic(positive, place))))
    found = [value for _, value in sorted(pair for part in gather(quantiles) for pair in part)]
    return tokens, sum(found) / len(found) if found else math.inf


def _fit(name: str, mlp: Mlp, tokens: UnitCalls, largest: float, seed: int) -> None:
    """Learn weights and biases; ``largest`` is where hidden values are clipped."""
    parameters = [p for layer in (mlp.first, mlp.second) for p in (layer.weight, layer.bias) if p is not None]
    values = [p.detach().clone().requires_grad_() for p in parameters]
    learned = dict(zip(parameters, values, strict=True))
    weights = [learned[mlp.first.weight], learned[mlp.second.weight]]
    biases = [None if layer.bias is None else learned[layer.bias] for layer in (mlp.first, mlp.second)]
    minibatches = Minibatches(tokens, BATCH, torch.Generator().manual_seed(seed), weights[0].device)
    optimizer = torch.optim.Adam(values, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        (batch,) = minibatches.draw()
        with torch.enable_grad():
            hidden = F.linear(*batch.args, weights[0], biases[0]).relu()  # [tokens, hidden channels]
            clipped = hidden.clamp(max=largest)
            errors = [F.linear(h, weights[1], biases[1]) - batch.targets for h in (hidden, clipped)]
            loss = sum(w * e.square().sum(1).mean() for w, e in zip((1.0, CLIPPED_WEIGHT), errors, strict=True))
        for value, grad in zip(values, torch.autograd.grad(loss, values), strict=True):
            value.grad = grad
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        take_from_first(values)  # all processes are told alike whether they are finite
        if not all(bool(value.isfinite().all()) for value in values):
            raise CalibrationError(f"refit of MLP {name!r}: its inputs or outputs are NaN or infinite")
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
