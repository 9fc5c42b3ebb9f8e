"""The accuracy benchmark's rows as Markdown: ``docs/results.md``."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accuracy_grid import (
    ABLATIONS,
    BASE,
    DETECTORS,
    EIGHT,
    FIRST_BITS,
    GROUNDS,
    NUM_CALIB,
    PLUS,
    SCOPES,
    TWO,
    Spec,
    base_of,
    label,
)

Row = dict[str, Any]
TASKS = ("bbox", "segm")
SORTED_BY = "W4A4"
NOT_RUN = "-"
GROUND_TEXT = {
    "plain": "the checkpoint as it is",
    "stressed": "the same float function with uneven channels (`tools/stress_detector.py`)",
}
DIFFICULTY_TEXT = (
    "Measured with `python benchmarks/difficulty.py CONFIG CHECKPOINT`, which explains the statistics; median over the "
    "blocks /\nlargest."
)
PUBLISHED_TEXT = (
    "Box / mask AP on COCO val2017 as the sources print it "
    "([published_coco.json](../benchmarks/results/published_coco.json)). The demo\ndetectors are small, and so is "
    "their data: nothing above can be compared with these figures in absolute terms."
)


# -- numbers --------------------------------------------------------------------------------------------------


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and largest less smallest value where there is more than one."""
    return statistics.fmean(values), max(values) - min(values) if len(values) > 1 else None


def percent(row: Row, task: str, kind: str = "metrics") -> float:
    """AP of a row in percent; mmdet gives none of a run without a single detection."""
    return 100 * row[kind].get(f"coco/{task}_mAP", 0.0)


def box_and_mask(rows: Sequence[Row], kind: str = "metrics") -> str:
    """``box / mask`` AP over runs that differ in their seed: ``48.1 ± 0.3 / 47.2 ± 0.2``; empty without rows."""
    return " / ".join(_ap(rows, task, kind) for task in TASKS) if rows else ""


def _ap(rows: Sequence[Row], task: str, kind: str = "metrics") -> str:
    mean, spread = mean_and_spread([percent(row, task, kind) for row in rows])
    return f"{mean:.1f}" if spread is None else f"{mean:.1f} ± {spread:.1f}"


def bits_order(bits: str) -> tuple[int, ...]:
    """Sort key of bit widths, the widest first."""
    weight, activation = map(int, bits[1:].split("A"))
    return -(weight + activation), -weight


def float_rows(rows: Sequence[Row], spec: Spec) -> list[Row]:
    """The first row that tells the float AP of this run's checkpoint and val images, or nothing."""
    key = (spec.detector, spec.ground, spec.num_val)
    found = [(row, Spec.from_row(row)) for row in rows if row["float_metrics"]]
    return [row for row, s in found if (s.detector, s.ground, s.num_val) == key][:1]


def compared(rows: Sequence[Row]) -> list[Row]:
    """The runs without changed options, less those that only the ablation of the number of images asked for.

    Those are told by their recipe being the only one that was run with so many images.
    """
    plain = [(row, (*_table_key(row), row["num_calib"])) for row in rows if not Spec.from_row(row).options]
    recipes: dict[tuple, set[str]] = {}
    for row, key in plain:
        recipes.setdefault(key, set()).add(row["recipe"])
    ablated = {_comparable(spec) for spec in ABLATIONS["calibration images"].values() if spec != BASE}
    return [row for row, key in plain if len(recipes[key]) > 1 or _comparable(Spec.from_row(row)) not in ablated]


def _table_key(row: Row) -> tuple:
    spec = Spec.from_row(row)
    return spec.detector, spec.ground, spec.scope, spec.num_val


# -- tables ---------------------------------------------------------------------------------------------------


def markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *lines))


def summary_table(rows: Sequence[Row]) -> str:
    """The default recipe by detector, ground, scope and bits; below each line the best of all other recipes by task.

    Runs with another number of calibration images or of val images are passed over.
    """
    usual = [row for row in compared(rows) if row["num_calib"] == NUM_CALIB and Spec.from_row(row).num_val is None]
    widths = sorted({row["bits"] for row in usual}, key=bits_order)
    lines = []
    for key in sorted({_table_key(row) for row in usual}, key=_page_order):
        here = [row for row in usual if _table_key(row) == key]
        by_width = [[row for row in here if row["bits"] == width] for width in widths]
        ours = [[row for row in found if row["recipe"] == PLUS.recipe] for found in by_width]
        if not any(ours):
            continue
        detector, ground, scope, _ = key
        reference = box_and_mask(_reference(rows, here), "float_metrics")
        cells = [box_and_mask(found) or NOT_RUN for found in ours]
        lines.append([f"{detector}, {ground}, `{scope}`", reference, f"`{PLUS.recipe}`", *cells])
        others = [_best_other(found) for found in by_width]
        lines += [["", "", "best other", *others]] if any(other != NOT_RUN for other in others) else []
    return markdown(["run", "float", "recipe", *widths], lines)


def _best_other(rows: Sequence[Row]) -> str:
    """Name and AP of the recipe with the highest box and of that with the highest mask AP but for the default one."""
    recipes = {row["recipe"] for row in rows} - {PLUS.recipe}
    found = [[row for row in rows if row["recipe"] == recipe] for recipe in sorted(recipes)]
    if not found:
        return NOT_RUN

    def means(same: list[Row], *tasks: str) -> list[float]:
        return [round(statistics.fmean(percent(row, task) for row in same), 1) for task in tasks]

    best = [max(found, key=lambda same: means(same, *order)) for order in (TASKS, TASKS[::-1])]
    if best[0] is best[1]:
        return f"`{best[0][0]['recipe']}` {box_and_mask(best[0])}"
    return " / ".join(f"`{same[0]['recipe']}` {_ap(same, task)}" for same, task in zip(best, TASKS, strict=True))


def recipe_table(rows: Sequence[Row], reference: Sequence[Row]) -> str:
    """Recipes by bits, the best at 4 bits first, below the float detector."""
    widths = sorted({row["bits"] for row in rows}, key=bits_order)
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["recipe"], row["num_calib"]), []).append(row)

    def rank(found: Sequence[Row]) -> float:
        aps = [percent(row, "bbox") for row in found if row["bits"] == SORTED_BY]
        return statistics.fmean(aps) if aps else -1.0

    timed = [width for width in FIRST_BITS if width in widths] or widths[:1]
    lines = [["float", "", *[box_and_mask(reference, "float_metrics") or "not measured"] * len(widths), "", ""]]
    for (recipe, images), found in sorted(groups.items(), key=lambda item: -rank(item[1])):
        cells = [box_and_mask([row for row in found if row["bits"] == width]) or NOT_RUN for width in widths]
        seconds = [median_seconds([row for row in found if row["bits"] == width]) for width in timed]
        lines.append([f"`{recipe}`", str(images), *cells, " / ".join(seconds), peak_memory(found)])
    return markdown(["recipe", "images", *widths, f"seconds at {' / '.join(timed)}", "peak memory"], lines)


def cost(rows: Sequence[Row]) -> list[str]:
    """Median seconds of calibration, and the highest peak of memory."""
    return [f"{median_seconds(rows)} s", peak_memory(rows)]


def median_seconds(rows: Sequence[Row]) -> str:
    """Of calibration; what stands for runs that are missing where there are none."""
    return f"{statistics.median(row['calibration_seconds'] for row in rows):.0f}" if rows else NOT_RUN


def peak_memory(rows: Sequence[Row]) -> str:
    """The highest of all runs."""
    return f"{max(row['peak_memory_bytes'] for row in rows) / 2**20:.0f} MiB"


def ablation_table(rows: Sequence[Row], num_val: int | None = None) -> str:
    """Each single change beside its base, where something but the base was run; empty if nothing was."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        spec = Spec.from_row(row)
        if spec.num_val == num_val:
            found.setdefault(_comparable(spec), []).append(row)
    lines = []
    for varied, variants in ABLATIONS.items():
        base_spec = base_of(variants)
        base = found.get(_comparable(base_spec), [])
        if not any(_comparable(spec) in found for spec in variants.values() if spec != base_spec):
            continue
        for variant, spec in variants.items():
            same = found.get(_comparable(spec), [])
            if same:
                name = f"{variant} (base)" if spec == base_spec else variant
                lines.append([varied, name, box_and_mask(same), *differences(same, base), *cost(same)])
    header = ["varied", "variant", "AP", "box - base", "mask - base", "calibration", "peak memory"]
    return markdown(header, lines) if lines else ""


def _comparable(spec: Spec) -> str:
    """The run but for its seed and its val images."""
    key = (spec.detector, spec.ground, spec.scope, spec.bits, spec.recipe, spec.num_calib, sorted(spec.options.items()))
    return repr(key)


def differences(rows: Sequence[Row], base: Sequence[Row]) -> list[str]:
    """Mean AP of ``rows`` less that of ``base``, for boxes and masks."""
    if not base:
        return ["", ""]
    means = [[statistics.fmean(percent(row, task) for row in part) for part in (rows, base)] for task in TASKS]
    return [f"{mean - base_mean:+.1f}" for mean, base_mean in means]


def other_options(rows: Sequence[Row]) -> str:
    """Runs with options that are no ablation; empty if there are none."""
    listed = {_comparable(spec) for variants in ABLATIONS.values() for spec in variants.values()}
    found: dict[str, list[Row]] = {}  # by all but the seed
    for row in rows:
        spec = Spec.from_row(row)
        if spec.options and _comparable(spec) not in listed:
            found.setdefault(repr(replace(spec, seed=0)), []).append(row)
    lines = []
    for same in found.values():
        spec = Spec.from_row(same[0])
        where = f"{spec.detector}, {spec.ground}, {spec.scope}, {spec.bits}, `{spec.recipe}`"
        lines.append([where, label(spec.options), box_and_mask(same), *cost(same)])
    return markdown(["run", "options", "AP", "calibration", "peak memory"], lines) if lines else ""


def published_tables(path: Path) -> str:
    """Published figures, a table for each bit width, notes below."""
    content = json.loads(path.read_text())
    detectors = list(dict.fromkeys(row["detector"] for row in content["rows"]))
    parts = []
    for bits in dict.fromkeys(row["bits"] for row in content["rows"]):
        methods: dict[str, dict[str, Row]] = {}
        for row in content["rows"]:
            if row["bits"] == bits:
                methods.setdefault(row["method"], {})[row["detector"]] = row
        lines = []
        for method, found in methods.items():
            first = next(iter(found.values()))
            source = "; ".join(filter(None, (first["source"], first.get("note"))))
            cells = [f"{found[d]['bbox']:.1f} / {found[d]['segm']:.1f}" if d in found else "" for d in detectors]
            lines.append([method, *cells, source])
        parts.append(
            f"{'float' if bits == 'W32A32' else bits}:\n\n" + markdown(["method", *detectors, "source"], lines)
        )
    return "\n\n".join(parts)


def difficulty_table(paths: Sequence[Path]) -> str:
    """A column for each file of ``benchmarks/difficulty.py``: median over blocks, and the largest."""
    found = {path.stem.removeprefix("difficulty_"): json.loads(path.read_text()) for path in paths}
    names = dict.fromkeys(name for content in found.values() for name in content["median"])
    lines = [[f"`{name}`", *(_median_and_largest(content, name) for content in found.values())] for name in names]
    return markdown(["statistic", *found], lines)


def _median_and_largest(content: dict[str, dict[str, float]], name: str) -> str:
    kinds = ("median", "largest")
    return " / ".join(f"{content[kind][name]:.3g}" for kind in kinds) if name in content["median"] else ""


# -- the page -------------------------------------------------------------------------------------------------


def how_it_was_made(rows: Sequence[Row]) -> str:
    """Commands, versions and machines of the rows."""
    versions = sorted({", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows})
    machines = sorted({f"{row.get('cpu', 'processor not recorded')}, threads: {row['threads']}" for row in rows})
    dated = sum(bool(row.get("commit")) for row in rows)
    told = [f"{dated} rows name the commit that made them; older ones are of that which added them, or one before."]
    log = "[benchmarks/results/accuracy.jsonl](../benchmarks/results/accuracy.jsonl)"
    lines = [
        "    python tools/make_demo_data.py --out data/demo",
        "    python benchmarks/accuracy.py",
        "    python benchmarks/accuracy.py --ablations",
        "",
        f"{len(rows)} runs, one line each in {log};",
        "this page is written from them by `python benchmarks/accuracy.py --report`. What the grid lacks came from the",
        "same script's options (`--recipes`, `--bits`, `--scopes`, `--num-calib`, `--best`, `--cfg-options`).",
        *(told if dated else []),
        "",
        *[f"* Versions: {text}." for text in versions],
        *[f"* Machine: {text}." for text in machines],
        "* Cells are box / mask AP in percent on the val images of the drawn demo set ([demo-detectors.md]"
        "(demo-detectors.md)); with",
        "  several seeds the mean ± the largest less the smallest. A seed chooses the calibration images, from the",
        "  train split.",
        f"* Recipes are sorted by box AP at {SORTED_BY}. Seconds of calibration are the median of a cell's runs, peak "
        f"memory",
        f"  the highest of a line's. {NOT_RUN} has not been run.",
    ]
    if len(machines) > 1:
        lines += [
            "* Machines differ in speed, and most ran other work beside: seconds are upper bounds, and those of two",
            "  lines can be compared only roughly. Processors round differently, too: where the seeds of a cell ran on",
            "  more than one, its ± holds both.",
        ]
    return "\n".join(lines)


def render(rows: Sequence[Row], results: Path) -> str:
    """The whole page.

    Args:
        rows: finished runs.
        results: folder with ``published_coco.json`` and, where there are any, ``difficulty_*.json``.
    """
    parts = ["# Results on the demo detectors", how_it_was_made(rows)]
    parts += [
        "![AP over bits](images/ap_over_bits.png)",
        "![AP over calibration time](images/ap_over_time.png)",
        "Both plots show scope `backbone` and the number of calibration images that most runs of a panel have.",
        f"## `{PLUS.recipe}` and the best of the others",
        f"{NUM_CALIB} calibration images; the others are the recipes that have been run, the best by box AP and the "
        "best by mask AP where these are two.",
        summary_table(rows),
    ]
    tables: dict[tuple, list[Row]] = {}
    for row in compared(rows):
        tables.setdefault(_table_key(row), []).append(row)
    for key in sorted(tables, key=_page_order):
        detector, ground, scope, num_val = key
        part = "" if num_val is None else f", first {num_val} val images only"
        parts += [f"## {detector}, {ground}, scope `{scope}`{part}"]
        parts += [f"Float detector: {GROUND_TEXT[ground]}.", recipe_table(tables[key], _reference(rows, tables[key]))]
    for num_val in _val_sizes(rows):
        part = "" if num_val is None else f", first {num_val} val images only"
        table = ablation_table(rows, num_val)
        if table:
            parts += [f"## Ablations{part}", _ablation_text(), table]
    others = other_options(rows)
    parts += ["## Other runs with changed options", others] if others else []
    difficulties = sorted(results.glob("difficulty_*.json"))
    if difficulties:
        parts += ["## How hard the detectors are to quantize", DIFFICULTY_TEXT, difficulty_table(difficulties)]
    parts += [
        "## Published, not measured here",
        PUBLISHED_TEXT,
        published_tables(results / "published_coco.json"),
    ]
    return "\n\n".join(parts) + "\n"


def _reference(rows: Sequence[Row], table: Sequence[Row]) -> list[Row]:
    return float_rows(rows, Spec.from_row(table[0]))


def _page_order(key: tuple) -> tuple:
    detector, ground, scope, num_val = key
    return num_val or 0, DETECTORS.index(detector), GROUNDS.index(ground), SCOPES.index(scope)


def _val_sizes(rows: Sequence[Row]) -> list[int | None]:
    return sorted({Spec.from_row(row).num_val for row in rows}, key=lambda size: size or 0)


def _ablation_text() -> str:
    return (
        f"Single changes of `{BASE.recipe}`, {BASE.detector}, {BASE.ground}, scope `{BASE.scope}`, {BASE.bits}, "
        f"{BASE.num_calib} images (the base), of `{PLUS.recipe}` at {PLUS.bits} and {TWO.bits}, and of "
        f"`{EIGHT.recipe}` at {EIGHT.bits}. Where nothing is said, one seed."
    )


def write_report(rows: Sequence[Row], path: Path, results: Path) -> None:
    """Write the page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(rows, results))
