"""The runs of the accuracy benchmark: which there are, in which order, which are done, and how long the rest takes."""

import hashlib
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs" / "_base_" / "recipes"

DETECTORS = ("mask-rcnn", "cascade-mask-rcnn")
GROUNDS = ("plain", "stressed")
SCOPES = ("backbone", "detector")  # the first of every recipe, the second of the main recipes only
NUM_CALIB = 32
FIRST_BITS = ("W4A4", "W3A3")  # of every recipe, the most telling first
MORE_BITS = ("W8A8", "W6A6", "W2A4")  # of the main recipes only
MAIN_RECIPES = ("minmax", "repq", "apq", "apq_plus")  # a name stands for its fast form where there is one
# by their mean AP over all detectors and grounds at the first bits, scope backbone, seed 0
BEST_RECIPES = ("apq_plus", "isvit", "aphq", "fimaq", "qwt")
SEEDS_OF_THE_BEST = (0, 1, 2)
LONGEST_NAME = 200  # of a run's folder


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What tells one run from another.

    The defaults are those of rows that were written before a key existed.

    Args:
        ground: 'plain', the checkpoint as it is, or 'stressed', the same function with uneven channels.
        options: ``--cfg-options`` of the run, by key.
        num_val: only the first so many val images are evaluated; None for all.
    """

    detector: str
    ground: str = "plain"
    scope: str
    bits: str
    recipe: str
    num_calib: int = NUM_CALIB
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    num_val: int | None = None

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Spec":
        """The run that a row of results tells of."""
        return cls(**{key.name: row[key.name] for key in fields(cls) if key.name in row})

    @property
    def name(self) -> str:
        """Name of the run's folder."""
        values = {**asdict(self), "options": label(self.options), "num_val": self.num_val and f"first-{self.num_val}"}
        parts = [
            re.sub(r"[^\w.=-]+", "-", str(value)).strip("-") for value in values.values() if value not in ("", None)
        ]
        name = "_".join(parts)
        if len(name) <= LONGEST_NAME:
            return name
        return f"{name[: LONGEST_NAME - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def label(options: dict[str, Any]) -> str:
    """Short text for a run's options: ``search.metric=module``."""
    return ", ".join(f"{key.removeprefix('model.quant.')}={value}" for key, value in options.items())


# -- the grid -------------------------------------------------------------------------------------------------


def known_recipes() -> list[str]:
    """Names of the recipes in ``configs/_base_/recipes``."""
    return sorted(path.stem for path in RECIPES.glob("*.py"))


def has_fast_form(recipe: str) -> bool:
    """Whether the recipe's exact search is so slow that another recipe is its fast form."""
    return (RECIPES / f"{recipe}_fast.py").is_file()


def main_recipes(recipes: Sequence[str]) -> list[str]:
    """Those recipes that run at all bits and in all scopes."""
    return [r for r in recipes if r.removesuffix("_fast") in MAIN_RECIPES and not has_fast_form(r)]


def make_grid(
    recipes: Sequence[str],
    best: Sequence[str] = (),
    bits: Sequence[str] | None = None,
    detectors: Sequence[str] | None = None,
    grounds: Sequence[str] | None = None,
    scopes: Sequence[str] | None = None,
    num_calib: int = NUM_CALIB,
    num_val: int | None = None,
) -> list[Spec]:
    """All runs, the most telling first.

    Args:
        recipes: their names.
        best: recipes that run with several seeds, at the first bits or those that are given.
        bits, scopes: of every recipe; None for the first of every recipe and all of the main ones.
        detectors, grounds: what is combined; None for all of them, but of a slow exact form the first alone, because
            its fast form runs on all.
        num_calib, num_val: of every run.
    """
    main = main_recipes(recipes)
    specs = [
        Spec(
            detector=detector,
            ground=ground,
            scope=scope,
            bits=width,
            recipe=recipe,
            num_calib=num_calib,
            seed=seed,
            num_val=num_val,
        )
        for recipe in recipes
        for width in bits or (FIRST_BITS + MORE_BITS if recipe in main else FIRST_BITS)
        for scope in scopes or (SCOPES if recipe in main else SCOPES[:1])
        for seed in (SEEDS_OF_THE_BEST if recipe in best and width in (bits or FIRST_BITS) else (0,))
        for detector in detectors or _all_or_first(DETECTORS, recipe)
        for ground in grounds or _all_or_first(GROUNDS, recipe)
    ]
    return sorted(specs, key=_rank)


def _all_or_first(values: tuple[str, ...], recipe: str) -> tuple[str, ...]:
    return values[:1] if has_fast_form(recipe) else values


def _rank(spec: Spec) -> tuple[int, ...]:
    """Sort key: slow exact forms last; before them by seed, first bits, ground, bits, scope and detector."""
    widths = FIRST_BITS + MORE_BITS
    width = widths.index(spec.bits) if spec.bits in widths else len(widths)
    return (
        has_fast_form(spec.recipe),
        spec.seed,
        width >= len(FIRST_BITS),
        GROUNDS.index(spec.ground),
        width,
        SCOPES.index(spec.scope),
        DETECTORS.index(spec.detector),
    )


# -- ablations: single changes of one run ---------------------------------------------------------------------

BASE = Spec(detector="mask-rcnn", scope="backbone", bits="W4A4", recipe="apq_fast")
PLUS = replace(BASE, bits="W3A3", recipe="apq_plus")  # at these bits its parts tell
TWO = replace(PLUS, bits="W2A4")
EIGHT = replace(BASE, bits="W8A8", recipe="minmax")
_SEARCH, _FORMATS = "model.quant.search", "model.quant.formats"
_ATTENTION = f"{_FORMATS}.products.attention"
_AT_BLOCK = {f"{_SEARCH}.metric": "block", f"{_SEARCH}.objective.type": "hessian"}


def _changed(key: str, value: Any, base: Spec = BASE) -> Spec:
    return replace(base, options={key: value})


def _at_four_bits(pattern: str, *roles: str) -> Spec:
    rule = "model.quant.overrides.four"
    return replace(EIGHT, options={f"{rule}.pattern": pattern, **{f"{rule}.{role}.bits": 4 for role in roles}})


# what is varied -> variant -> run; the base is a variant of each
ABLATIONS: dict[str, dict[str, Spec]] = {
    "metric": {"block": BASE, "module": _changed(f"{_SEARCH}.metric", "module")},
    "share eliminated": {
        "0": _changed(f"{_SEARCH}.objective.eliminate", 0.0),
        "0.05": _changed(f"{_SEARCH}.objective.eliminate", 0.05),
        "0.1": BASE,
        "0.2": _changed(f"{_SEARCH}.objective.eliminate", 0.2),
        "0.5": _changed(f"{_SEARCH}.objective.eliminate", 0.5),
    },
    "half eliminated by": {  # a tenth is too little for the criterion to tell
        "error": _changed(f"{_SEARCH}.objective.eliminate", 0.5),
        **{
            by: replace(BASE, options={f"{_SEARCH}.objective.eliminate": 0.5, f"{_SEARCH}.objective.eliminate_by": by})
            for by in ("gradient", "weighted")
        },
    },
    "attention format": {
        "matthew (MPQ)": BASE,
        "affine, free range": replace(
            BASE, options={f"{_ATTENTION}.format": "affine", f"{_SEARCH}.grids.MatMul": [0.1, 1.2, 23]}
        ),
        "log_sqrt2": _changed(f"{_ATTENTION}.format", "log_sqrt2"),
        "twin_softmax": _changed(f"{_ATTENTION}.format", "twin_softmax"),
        "row_affine": _changed(f"{_ATTENTION}.format", "row_affine"),
    },
    "gradient at": {
        "the disturbed model": BASE,
        "a perturbation of the float model": _changed("model.quant.importance", "perturbation"),
    },
    "order in a block": {"backward": BASE, "forward": _changed(f"{_SEARCH}.order", "forward")},
    "calibration images": {str(n): replace(BASE, num_calib=n) for n in (1, 4, 8, 16, 32, 64, 128)},
    "four bits of one role, eight elsewhere": {
        "none": EIGHT,
        "attention maps": _at_four_bits("*attention_value", "attention"),
        "values": _at_four_bits("*attention_value", "value"),
        "queries and keys": _at_four_bits("*query_key", "query", "key"),
        "inputs of qkv and proj": _at_four_bits("*w_msa.*", "input"),
        "inputs of both FFN layers": _at_four_bits("*ffn*", "input"),
        "inputs of patch mergings": _at_four_bits("*downsample*", "input"),
    },
    "parts of apq_plus": {
        "all": PLUS,
        "float block inputs": _changed(f"{_SEARCH}.block_input", "float", PLUS),
        "channels as they are": _changed("model.quant.equalize", 0.0, PLUS),
        "static ranges of inputs": _changed(f"{_FORMATS}.linear_low.max_bits", 2, PLUS),
        "channels of inputs as they are": _changed(f"{_FORMATS}.linear_low.input.granularity", "tensor", PLUS),
        "one step for a head's attention maps": _changed(f"{_ATTENTION}.format", "affine", PLUS),
        "logarithmic attention maps": replace(
            PLUS, options={f"{_ATTENTION}.format": "shift_log2", f"{_SEARCH}.grids.attention": [0.9, 1.0, 2]}
        ),
        "queries and keys around zero": replace(
            PLUS, options={f"{_FORMATS}.products_low.{role}.symmetric": True for role in ("query", "key")}
        ),
        "errors weighted by gradients": _changed(f"{_SEARCH}.objective.type", "hessian", PLUS),
        "no compensation": _changed("model.quant.compensation", None, PLUS),
        "inputs not made up for": _changed("model.quant.compensation.activations", False, PLUS),
        "weights rounded to nearest": _changed("model.quant.compensation.rounding", False, PLUS),
        "tokens weighted by gradients": _changed("model.quant.compensation.weighted", True, PLUS),
        "damping 0.02": _changed("model.quant.compensation.damping", 0.02, PLUS),
        "codes not learned": _changed("model.quant.reconstruction.max_bits", 2, PLUS),
    },
    "objective of apq_plus": {
        "squared error of the layer": PLUS,
        "of the block, weighted by gradients": replace(PLUS, options=_AT_BLOCK),
        "the same without the least tenth (BBC)": replace(
            PLUS, options={**_AT_BLOCK, f"{_SEARCH}.objective.eliminate": 0.1}
        ),
    },
    "tokens of an image in apq_plus": {
        "all, 3,136 at most": PLUS,
        "1024": _changed(f"{_SEARCH}.tokens", 1024, PLUS),
        "256": _changed(f"{_SEARCH}.tokens", 256, PLUS),
        "49, a window": _changed(f"{_SEARCH}.tokens", 49, PLUS),
    },
    "learned codes of apq_plus": {
        "straight through, 600 steps": TWO,
        "200 steps": _changed("model.quant.reconstruction.iterations", 200, TWO),
        "400 steps": _changed("model.quant.reconstruction.iterations", 400, TWO),
        "learning rate 0.02": _changed("model.quant.reconstruction.rounding_lr", 0.02, TWO),
        "none": _changed("model.quant.reconstruction", None, TWO),
        "softly, as AdaRound": replace(  # which starts at one end of the way between two codes and has far to go
            TWO,
            options={"model.quant.reconstruction.rounding": "adaround", "model.quant.reconstruction.rounding_lr": 0.05},
        ),
    },
}


def base_of(variants: dict[str, Spec]) -> Spec:
    """What the variants of one ablation are compared with: the common base where it is among them, else the first."""
    return BASE if BASE in variants.values() else next(iter(variants.values()))


def ablation_specs() -> list[Spec]:
    """The runs of all ablations, each once, the base first."""
    specs: list[Spec] = []
    for spec in (BASE, *(s for variants in ABLATIONS.values() for s in variants.values())):
        if spec not in specs:
            specs.append(spec)
    return specs


# -- results --------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished runs. A line that a killed writer left torn is dropped with a message."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}:{number}: dropped a torn line; its run counts as missing", flush=True)
    return rows


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add a line; what a killed writer left of another stays a line of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and not path.read_bytes().endswith(b"\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")


def missing(specs: Sequence[Spec], rows: Sequence[dict[str, Any]]) -> list[Spec]:
    """The runs without a row, in their order."""
    done = [Spec.from_row(row) for row in rows]
    return [spec for spec in specs if spec not in done]


def expected_seconds(spec: Spec, rows: Sequence[dict[str, Any]]) -> float | None:
    """Time of a run by the medians of the same recipe and detector; None if there is none yet.

    Calibration is linear in images, evaluation does not depend on them.
    """
    alike = [r for r in rows if r["recipe"] == spec.recipe and r["detector"] == spec.detector]
    if not alike:
        return None
    calibration = statistics.median(r["calibration_seconds"] / r["num_calib"] for r in alike)
    others = [r["seconds"] - r["calibration_seconds"] for r in alike if "seconds" in r]
    return calibration * spec.num_calib + (statistics.median(others) if others else 0.0)
