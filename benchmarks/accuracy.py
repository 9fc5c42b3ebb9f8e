"""AP of the demo detectors over a grid of scopes, bits and recipes; one JSON line a run, resumable.

python tools/make_demo_data.py --out data/demo
python benchmarks/accuracy.py                 # runs what is missing in benchmarks/results/accuracy.jsonl
python benchmarks/accuracy.py --table         # prints the results as Markdown
"""

import argparse
import contextlib
import itertools
import json
from pathlib import Path
from typing import Any

from apq_mmdet.engine import command

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("detector", "scope", "bits", "recipe", "num_calib", "seed")


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--detectors", nargs="+", default=["mask-rcnn", "cascade-mask-rcnn"])
    add("--scopes", nargs="+", default=["backbone", "detector"])
    add("--bits", nargs="+", default=["W8A8", "W6A6", "W4A4", "W3A3"])
    add("--recipes", nargs="+", default=["minmax", "apq_fast", "apq_pc_fast"])
    add("--num-calib", type=int, default=32)
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.jsonl")
    add("--work-dir", type=Path, default=ROOT / "work_dirs" / "accuracy")
    add("--table", action="store_true", help="only print the results")
    return parser.parse_args()


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run(spec: dict[str, Any], work_dir: Path, eval_float: bool) -> dict[str, Any]:
    """One run of the command; its log goes to the work dir."""
    out = work_dir / "_".join(str(spec[key]) for key in KEYS)
    out.mkdir(parents=True, exist_ok=True)
    name = f"{spec['detector']}_swin-demo"
    weight, activation = spec["bits"][1:].split("A")
    options = [str(ROOT / "configs" / "demo" / f"{name}.py"), str(ROOT / "demo" / f"{name}.pth")]
    options += ["--work-dir", str(out), "--recipe", spec["recipe"], "--scope", spec["scope"]]
    options += ["--w-bits", weight, "--a-bits", activation, "--resume"]
    options += ["--num-calib", str(spec["num_calib"]), "--seed", str(spec["seed"]), "--device", "cpu"]
    with (out / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
        code = command.main([*options, "--eval-float"] if eval_float else options)
    if code:
        raise SystemExit(f"{out}: the command failed with exit code {code}")
    report = json.loads((out / "report.json").read_text())
    return {
        **spec,
        "metrics": report["metrics"]["quantized"],
        "float_metrics": report["metrics"]["float"],
        "calibration_seconds": round(report["calibration_seconds"], 1),
        "threads": report["threads"],
        "peak_memory_bytes": report["peak_memory"]["host_bytes"],
        "checkpoint_bytes": report["sizes"]["quantized_checkpoint_bytes"],
        "versions": report["versions"],
    }


def ap(metrics: dict[str, float]) -> str:
    """``box / mask`` AP in percent."""
    return " / ".join(f"{100 * metrics[f'coco/{task}_mAP']:.1f}" for task in ("bbox", "segm"))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: a line for each detector, scope and recipe, a column for each bit width."""
    bits = sorted({row["bits"] for row in rows}, reverse=True)
    floats = {row["detector"]: ap(row["float_metrics"]) for row in rows if row["float_metrics"]}
    lines = ["| detector | scope | recipe | images | float | " + " | ".join(bits) + " | calibration |"]
    lines.append("|" + "---|" * (6 + len(bits)))
    groups: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["detector"], row["scope"], row["recipe"], row["num_calib"]), {})[row["bits"]] = row
    for (detector, scope, recipe, images), found in groups.items():
        cells = [ap(found[b]["metrics"]) if b in found else "" for b in bits]
        seconds = max(row["calibration_seconds"] for row in found.values())
        lines.append(
            f"| {detector} | {scope} | `{recipe}` | {images} | {floats.get(detector, '')} | "
            + " | ".join(cells)
            + f" | {seconds:.0f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then print the table."""
    args = parse_args()
    rows = read(args.out)
    if not args.table:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        for values in itertools.product(args.detectors, args.scopes, args.bits, args.recipes):
            spec = dict(zip(KEYS, (*values, args.num_calib, args.seed), strict=True))
            if any(all(row[key] == spec[key] for key in KEYS) for row in rows):
                continue
            first = not any(row["detector"] == spec["detector"] and row["float_metrics"] for row in rows)
            rows.append(run(spec, args.work_dir, eval_float=first))
            with args.out.open("a") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            print(spec, ap(rows[-1]["metrics"]), flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
