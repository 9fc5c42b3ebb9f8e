"""What reconstruction learns, and by which loss, against the authors' own code on the same tensors.

    git clone https://github.com/yhhhli/BRECQ
    git clone https://github.com/wimh966/QDrop
    git clone https://github.com/GoatWu/APHQ-ViT
    git clone https://github.com/ShiheWang/FIMA-Q
    python benchmarks/official_learning.py --brecq BRECQ --qdrop QDrop --aphq APHQ-ViT --fimaq FIMA-Q

This runs code of those folders, with stand-ins for what it imports and does not need here; what is known of one that is
not given stays as it is. Losses are compared by their gradients for the output, over the largest one of each, since a
constant factor means nothing to Adam.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import torch
from official_formats import BITS, Case, commit, compared, load, parse_args
from torch import Tensor, nn

from apq_mmdet.calibration.learned import GAMMA, ZETA, LearnedRounding, _LearnedStep, _rectified_sigmoid
from apq_mmdet.calibration.reconstruction import WEIGHTINGS
from apq_mmdet.files import write_json
from apq_mmdet.layers import quantize_model
from apq_mmdet.policy import Policy

OUT = Path(__file__).parent / "results" / "official_learning.json"
STEPS = 1000  # of a training whose regulariser is compared
DONE = (0.3, 0.6, 0.95)  # shares of it, behind the warm-up, in which neither has one
STAND_INS = ("linklink", "utils", "utils.calibrator")  # the first asks for CUDA


def official(folder: Path, path: str) -> ModuleType:
    """A module of a checkout, whose packages are forgotten again: several repositories have some of one name."""
    stand_ins = [name for name in STAND_INS if name == "linklink" or not (folder / name.split(".")[0]).is_dir()]
    sys.modules.update({name: MagicMock() for name in stand_ins})
    try:
        return load(folder, path)
    finally:
        own = [name for name, module in sys.modules.items() if str(folder) in str(getattr(module, "__file__", ""))]
        for name in (*own, *stand_ins):
            sys.modules.pop(name, None)


def outputs() -> tuple[Tensor, Tensor, Tensor]:
    """Output, float output and gradient of a block, [8 units, 49 tokens, 96 channels]."""
    generator = torch.Generator().manual_seed(0)
    target, error, grad = (torch.randn(8, 49, 96, generator=generator) for _ in range(3))
    return target + error / 10, target, grad


def slope(loss: Callable[[Tensor], Tensor], output: Tensor) -> Tensor:
    """Gradient of a loss for the output, over the largest one."""
    output = output.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(output), output)
    return grad / grad.abs().max()


def own_slope(weighting: str, term: int = 0, weights: Tensor | None = None) -> Tensor:
    """That of one term of a loss of this package, under the gradient of ``outputs`` or other weights."""
    output, target, grad = outputs()
    grad = grad if weights is None else weights
    return slope(lambda o: WEIGHTINGS[weighting]((o - target).flatten(1), grad.flatten(1))[term], output)


def linear(bits: int) -> nn.Linear:
    """A quantized layer whose weights [24, 48] have a range for each output channel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 24))
    formats = dict(linear=dict(kind="Linear", weight=dict(granularity="channel")))
    quantize_model(model, Policy.from_dict(dict(w_bits=bits, a_bits=bits, formats=formats)))
    quantizer = model[0].quantizers["weight"]
    quantizer.observe(model[0].weight.detach())
    quantizer.set_range_factor(0.9)
    return model[0]


# -- cases: what is compared with each repository -------------------------------------------------------------


def brecq(folder: Path, bits: int) -> Iterator[Case]:
    """AdaRound: what the block computes with while it learns, its regulariser, and what is left; the weighted loss."""
    layer = linear(bits)
    quantizer, learned = layer.quantizers["weight"], LearnedRounding([layer], weight=1.0)
    their = official(folder, "quant/adaptive_rounding.py")
    ranges = argparse.Namespace(n_bits=bits, sym=False, n_levels=2**bits)
    ranges.delta, ranges.zero_point = quantizer.scale[:, None], quantizer.zero_point[:, None]
    theirs = their.AdaRoundQuantizer(ranges, layer.weight.detach(), "learned_hard_sigmoid")
    theirs.soft_targets = True
    inside = (learned._gap > 0).view_as(layer.weight)  # beyond the ends of the range ours has nothing to choose
    moved = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
    for what, shift in (("as it starts", 0.0), ("after V has moved", moved)):
        with torch.no_grad():
            values = (learned.values.view_as(moved) + shift).flatten()
            theirs.alpha.add_(shift)
            soft = torch.addcmul(learned._below, learned._gap, _rectified_sigmoid(values.sigmoid())).view_as(moved)
        yield "adaround", f"weights {what}", soft[inside], theirs(layer.weight)[inside].detach()
    with torch.no_grad():
        learned.values.copy_(values)
        theirs.soft_targets = False
        hard = theirs(layer.weight).detach()
    recon = official(folder, "quant/block_recon.py")
    for done in DONE:
        h = (torch.sigmoid(learned.values.detach()) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        pull = learned.own_grad(done)
        decay = recon.LinearTempDecay(STEPS, rel_start_decay=0.2, start_b=20, end_b=2)
        value = learned.values.detach().clone().requires_grad_()
        soft = torch.clamp(torch.sigmoid(value) * (theirs.zeta - theirs.gamma) + theirs.gamma, 0, 1)
        (want,) = torch.autograd.grad((1 - ((soft - 0.5).abs() * 2).pow(decay(done * STEPS))).sum(), value)
        free = (h > 0) & (h < 1)
        yield "adaround", f"gradient of the regulariser after {done:.0%}", pull[free], want[free]
    with torch.no_grad():
        learned.write()
    yield "adaround", "weights in the end", layer.weight.detach()[inside], hard[inside]
    output, target, grad = outputs()
    loss = recon.LossFunction(nn.Identity(), round_loss="none", rec_loss="fisher_diag")
    yield "hessian", "gradient of the loss", own_slope("hessian"), slope(lambda o: loss(o, target, grad), output)


def qdrop(folder: Path, bits: int) -> Iterator[Case]:
    """Learned steps: values, and gradients for the step and the input."""
    their = official(folder, "qdrop/quantization/util_quant.py")
    x = 2 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    scale, zero_point = torch.tensor(4.0 / 2**bits), 2 ** (bits - 1) - 1
    low, high = (torch.tensor(float(code - zero_point)) for code in (0, 2**bits - 1))
    found = []
    for function in (
        lambda x, step: _LearnedStep.apply(x, step, low, high),
        lambda x, step: their.fake_quantize_learnable_per_tensor_affine_training(
            x, step, zero_point, 0, 2**bits - 1, grad_factor=1.0
        ),
    ):
        given, step = x.clone().requires_grad_(), scale.clone().requires_grad_()
        value = function(given, step)
        weights = torch.randn(value.shape, generator=torch.Generator().manual_seed(1))
        found.append((value.detach(), *torch.autograd.grad((value * weights).sum(), (step, given))))
    (value, step, given), (their_value, their_step, their_given) = found
    yield "learned step", "values", value, their_value
    yield "learned step", "gradient for the step, over theirs", (step / their_step)[None], torch.ones(1)
    yield "learned step", "gradient for the input", given, their_given


def aphq(folder: Path, bits: int) -> Iterator[Case]:
    """The loss that is weighted by the change of gradients."""
    recon = official(folder, "utils/block_recon.py")
    loss = recon.LossFunction(nn.Identity(), round_loss="none", rec_loss="hessian_perturb")
    output, target, grad = outputs()
    yield "absolute", "gradient of the loss", own_slope("absolute"), slope(lambda o: loss(o, target, grad), output)


def fimaq(folder: Path, bits: int) -> Iterator[Case]:
    """Both terms of the loss under a Fisher matrix, each alone."""
    recon = official(folder, "utils/block_recon.py")
    output, target, grad = outputs()
    same = grad[:1].expand_as(grad)  # theirs are means over images
    for term, (name, what) in enumerate((("fisher_diag", "diagonal"), ("fisher_lr", "rank one"))):
        loss = recon.LossFunction(nn.Identity(), round_loss="none", rec_loss=name)
        theirs = slope(lambda o, loss=loss: loss(o, target, same[:1].flatten(1)), output)
        yield "fisher", f"{what}: gradient of the loss", own_slope("fisher", term, same), theirs


CASES: dict[str, Callable[[Path, int], Iterator[Case]]] = {"brecq": brecq, "qdrop": qdrop, "aphq": aphq, "fimaq": fimaq}
AT_ALL_BITS = ("brecq", "qdrop")  # losses know nothing of bits


def main() -> None:
    """Compare what is given, print a line for each comparison, and keep them."""
    args, result = parse_args(__doc__, CASES), json.loads(OUT.read_text()) if OUT.exists() else {}
    for name, cases in CASES.items():
        folder: Any = getattr(args, name)
        if folder is None:
            continue
        rows = []
        for bits in BITS if name in AT_ALL_BITS else BITS[:1]:
            for part, what, own, theirs in cases(folder.resolve(), bits):
                row = {"part": part, "compared": what, **({"bits": bits} if name in AT_ALL_BITS else {})}
                rows.append({**row, **compared(own, theirs)})
                print(*rows[-1].values(), flush=True)
        result[name] = {"commit": commit(folder), "rows": rows}
    write_json(OUT, result)


if __name__ == "__main__":
    main()
