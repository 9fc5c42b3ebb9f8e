"""Number formats of this package against the authors' own code, on the same tensors.

    git clone https://github.com/zkkli/RepQ-ViT
    git clone https://github.com/GoatWu/AdaLog
    git clone https://github.com/zysxmu/IaS-ViT
    git clone https://github.com/hahnyuan/PTQ4ViT
    python benchmarks/official_formats.py --repq RepQ-ViT --adalog AdaLog --isvit IaS-ViT --ptq4vit PTQ4ViT

This runs code of those folders; what is known of one that is not given stays as it is. Tensors are drawn from a seed:
softmax maps, GELU outputs and normal weights. Where the official code has a value more than 2^k, or puts its codes
together in another way than the paper says, the row tells what is compared.
"""

import argparse
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from apq_mmdet.files import write_json
from apq_mmdet.quantizers import Quantizer
from apq_mmdet.registry import QUANTIZERS

BITS = (3, 4, 6, 8)
OUT = Path(__file__).parent / "results" / "official_formats.json"
Case = tuple[str, str, Tensor, Tensor]  # format, what is compared, values of ours, values of theirs


def parse_args(description: str, repositories: Iterable[str]) -> argparse.Namespace:
    """Command line of a comparison with these repositories."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in repositories:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="checkout of that repository")
    return parser.parse_args()


def load(folder: Path, path: str) -> ModuleType:
    """A module of a checkout, whose top-level packages it may import."""
    spec = importlib.util.spec_from_file_location(f"official_{folder.name}_{Path(path).stem}", folder / path)
    module = importlib.util.module_from_spec(spec)
    with patch.object(sys, "path", [str(folder), *sys.path]):
        spec.loader.exec_module(module)
    return module


def tensors() -> dict[str, Tensor]:
    """What is quantized: softmax maps [64, 3, 49, 49], GELU outputs [64, 49, 384], weights [96, 384]."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(64, 3, 49, 49, generator=generator)
    gelu = F.gelu(2 * torch.randn(64, 49, 384, generator=generator))
    return {"softmax": (4 * draw).softmax(-1), "gelu": gelu, "weight": torch.randn(96, 384, generator=generator) / 20}


def ours(name: str, bits: int, x: Tensor, variant: float | None = None, **settings: Any) -> Quantizer:
    """A quantizer of a format, calibrated to the observed range of ``x``."""
    quantizer = QUANTIZERS.get(name)(bits, **settings)
    quantizer.use_observer("percentile" if settings == {} and name == "affine" else "minmax")
    quantizer.observe(x)
    quantizer.set_range_factor(1.0, variant)
    return quantizer


# -- cases: what is compared with each repository -------------------------------------------------------------


def repq(folder: Path, bits: int) -> Iterator[Case]:
    """Logarithm to base sqrt 2; ranges by percentile."""
    official, x = load(folder, "classification/quant/quantizer.py"), tensors()
    quantizer = ours("log_sqrt2", bits, x["softmax"])
    theirs = official.LogSqrt2Quantizer(bits).quantize(x["softmax"], quantizer.scale)
    below = quantizer.encode(x["softmax"]) < quantizer.code_max
    yield "log_sqrt2", "values of codes below the last", quantizer(x["softmax"])[below], theirs[below]
    scale, zero_point = official.UniformQuantizer(bits).init_quantization_scale(x["gelu"])
    quantizer = ours("affine", bits, x["gelu"])
    yield "percentile", "scale over theirs", quantizer.scale / scale, torch.ones(1)
    yield "percentile", "zero point", quantizer.zero_point.float(), zero_point.reshape(1)


def adalog(folder: Path, bits: int) -> Iterator[Case]:
    """Logarithm to a searched base."""
    official, x = load(folder, "quantizers/logarithm.py"), tensors()["softmax"]
    for q in (10, 20, 37, 60):
        quantizer = ours("adaptive_log", bits, x, float(q))
        below = quantizer.encode(x) < quantizer.code_max
        theirs = official.AdaLogQuantizer(bits)
        theirs.scale, theirs.inited = quantizer.scale, True
        theirs.q.fill_(q)
        theirs.update_table()
        for form, training in (("training", True), ("evaluation", False)):
            theirs.training_mode = training
            what = f"{form} form, Q = {q}, values of codes below the last"
            yield "adaptive_log", what, quantizer(x)[below], theirs(x)[below]


def isvit(folder: Path, bits: int) -> Iterator[Case]:
    """Uniform steps of a shifted logarithm."""
    official, x = load(folder, "quant/quantizer.py"), tensors()["softmax"]
    for shift in (0.001, 0.01, 0.1):
        quantizer, theirs = ours("shift_log2", bits, x - x.min(), shift), official.LogSqrt2Quantizer(bits)
        theirs.base = 2
        values = quantizer(x - x.min())  # its steps start from the least value, ours from zero
        yield "shift_log2", f"shift {shift}, as it is", values, theirs.quantize(x - x.min(), shift)[0]
        with patch.object(torch, "round", lambda exponents: exponents):  # codes are rounded by another function
            unrounded = theirs.quantize(x - x.min(), shift)[0]
        yield "shift_log2", f"shift {shift}, without rounding exponents", values, unrounded


def ptq4vit(folder: Path, bits: int) -> Iterator[Case]:
    """Twin ranges; symmetric codes."""
    linear, x = load(folder, "quant_layers/linear.py"), tensors()
    matmul = sys.modules["quant_layers.matmul"]
    for power in (3.0, 5.0, 7.0, 10.0):
        split, maps = 2**-power, x["softmax"]
        theirs = matmul.SoSPTQSLQuantMatMul(A_bit=bits, split=split)
        both = theirs.quant_input_A(maps)
        # the halves are added: below the split the upper one gives what it gives to zero, above it the lower one s
        apart = torch.where(maps < split, both - theirs.quant_input_A(torch.zeros(1)), both - split)
        yield (
            "twin_softmax",
            f"split 2^-{power:.0f}, the half of the value's range",
            *(
                ours("twin_softmax", bits, maps, power)(maps),
                apart,
            ),
        )
    quantizer, official = ours("twin_gelu", bits, x["gelu"]), linear.PostGeluPTQSLQuantLinear(384, 96, a_bit=bits)
    official.a_interval = [quantizer.scale.reshape(1, 1), 0.16997124254703522 / official.a_qmax]
    yield "twin_gelu", "values at the same step", quantizer(x["gelu"]), official.quant_input(x["gelu"])
    quantizer, official = ours("affine", bits, x["weight"], symmetric=True), linear.MinMaxQuantLinear(384, 96)
    official.a_interval, official.a_qmax = quantizer.scale, 2 ** (bits - 1)
    yield "affine", "symmetric, values at the same step", quantizer(x["weight"]), official.quant_input(x["weight"])


CASES: dict[str, Callable[[Path, int], Iterator[Case]]] = {
    "repq": repq,
    "adalog": adalog,
    "isvit": isvit,
    "ptq4vit": ptq4vit,
}


def commit(folder: Path) -> str:
    """The commit of a checkout."""
    line = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    return subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()


def compared(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """How far apart values are, and the share of those that have the same bits or differ by at most 1e-6."""
    apart = (ours - theirs).abs()
    return {
        "largest_difference": float(f"{float(apart.max()):.3g}"),
        "share_of_the_same_bits": round(float((ours == theirs).double().mean()), 6),
        "share_within_1e-6": round(float((apart <= 1e-6).double().mean()), 6),
    }


def main() -> None:
    """Compare what is given, print a line for each comparison, and keep them."""
    args, result = parse_args(__doc__, CASES), json.loads(OUT.read_text()) if OUT.exists() else {}
    for name, cases in CASES.items():
        folder = getattr(args, name)
        if folder is None:
            continue
        rows = []
        for bits in BITS:
            for format_name, what, own, theirs in cases(folder.resolve(), bits):
                rows.append({"format": format_name, "compared": what, "bits": bits, **compared(own, theirs)})
                print(*rows[-1].values(), flush=True)
        result[name] = {"commit": commit(folder), "rows": rows}
    write_json(OUT, result)


if __name__ == "__main__":
    main()
