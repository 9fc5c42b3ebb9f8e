"""AP of the demo detectors over a grid of checkpoints, scopes, bits and recipes; one JSON line a run, resumable.

    python tools/make_demo_data.py --out data/demo
    python benchmarks/accuracy.py                     # runs what benchmarks/results/accuracy.jsonl lacks, then reports
    python benchmarks/accuracy.py --ablations         # single changes of one run
    python benchmarks/accuracy.py --recipes apq_plus --bits W3A3 --cfg-options model.quant.equalize=0.5   # any other
    python benchmarks/accuracy.py --dry-run           # what is missing, and how long it takes
    python benchmarks/accuracy.py --report            # only docs/results.md and its plots

A grid that was stopped goes on where it was, within a run too. Each run is a process of its own, so that its peak
memory is its own and a run that dies does not end the grid. Exit code 1 if a run failed, 2 for bad input.
"""

import argparse
import json
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from accuracy_grid import (
    BEST_RECIPES,
    DETECTORS,
    GROUNDS,
    NUM_CALIB,
    ROOT,
    SCOPES,
    Spec,
    ablation_specs,
    append_row,
    expected_seconds,
    known_recipes,
    make_grid,
    missing,
    read_rows,
)
from accuracy_plots import draw_plots
from accuracy_report import box_and_mask, write_report
from mmengine.config import DictAction

from apq_mmdet.checks import check_choice
from apq_mmdet.engine.block_states import FINISHED
from apq_mmdet.engine.run_record import STATES
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import write_json

DATA = ROOT / "data" / "demo"
RESULTS = ROOT / "benchmarks" / "results"


class RunFailedError(RuntimeError):
    """A run ended without a result; the message says where its log is."""


def bits(text: str) -> str:
    """A bit width of the command line, such as W4A4."""
    if not re.fullmatch(r"W[2-8]A[2-8]", text):
        raise argparse.ArgumentTypeError(f"expected W<2-8>A<2-8> such as W4A4, got {text!r}")
    return text


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    of_slow = "of a recipe with a fast form the first unless given"
    add("--detectors", nargs="+", choices=DETECTORS, metavar="NAME", help=f"{', '.join(DETECTORS)}; all, {of_slow}")
    add("--grounds", nargs="+", choices=GROUNDS, help=f"checkpoints: {', '.join(GROUNDS)}; all, {of_slow}")
    add("--scopes", nargs="+", choices=SCOPES, help="default: backbone, of the main recipes also detector")
    add("--bits", nargs="+", type=bits, help="default: W4A4 and W3A3, of the main recipes also W8A8, W6A6, W2A4")
    add("--recipes", nargs="+", help="default: all in configs/_base_/recipes")
    best = f"recipes that run with seeds 0, 1 and 2 (default: {', '.join(BEST_RECIPES)})"
    add("--best", nargs="*", metavar="RECIPE", help=best)
    add("--num-calib", type=int, default=NUM_CALIB, help=f"calibration images (default: {NUM_CALIB})")
    add("--max-val", type=int, metavar="N", help="evaluate the first N val images only; kept apart from full runs")
    changes = "changes of every run, such as model.quant.search.rounds=2, for tools/quantize_det.py"
    add("--cfg-options", nargs="+", action=DictAction, default={}, metavar="KEY=VALUE", help=changes)
    add("--ablations", action="store_true", help="run the table of single changes instead of the grid")
    add("--dry-run", action="store_true", help="list the missing runs and their expected time, and stop")
    add("--limit-minutes", type=float, metavar="M", help="start no run after M minutes")
    add("--report", action="store_true", help="run nothing, only write the report")
    add("--out", type=Path, default=RESULTS / "accuracy.jsonl")
    add("--work-dir", type=lambda p: Path(p).resolve(), default=ROOT / "work_dirs" / "accuracy")
    add("--docs", type=Path, default=ROOT / "docs", help="folder for results.md and images/")
    return parser.parse_args(argv)


def chosen_specs(args: argparse.Namespace) -> list[Spec]:
    """The runs that the command line asks for.

    Raises:
        BadInputError: unknown recipe, or what chooses runs of the grid beside ablations, which are what they are.
    """
    if args.ablations:
        names = ("recipes", "best", "bits", "detectors", "grounds", "scopes")
        given = [f"--{name}" for name in names if vars(args)[name] is not None]
        given += ["--num-calib"] * (args.num_calib != NUM_CALIB) + ["--cfg-options"] * bool(args.cfg_options)
        if given:
            raise BadInputError(f"{', '.join(given)}: for runs of the grid, and --ablations has runs of its own")
        return [replace(spec, num_val=args.max_val) for spec in ablation_specs()]
    recipes = args.recipes or known_recipes()
    for recipe in recipes:
        check_choice(recipe, known_recipes(), "--recipes")
    for recipe in args.best or ():
        check_choice(recipe, recipes, "--best")
    best = BEST_RECIPES if args.best is None else args.best
    given = (args.bits, args.detectors, args.grounds, args.scopes, args.num_calib, args.max_val)
    options = json.loads(json.dumps(args.cfg_options))  # as rows have them: lists for tuples
    return [replace(spec, options=options) for spec in make_grid(recipes, best, *given)]


# -- one run --------------------------------------------------------------------------------------------------


def run_logged(line: Sequence[str], log: Path) -> None:
    """Run a Python script of the project, its output in ``log``.

    Raises:
        RunFailedError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        code = subprocess.run([sys.executable, *line], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise RunFailedError(f"exit code {code}, log in {log}")


def checkpoint(detector: str, ground: str, work_dir: Path) -> Path:
    """The float checkpoint of a ground; the stressed one is made where it is not there."""
    plain = ROOT / "demo" / f"{detector}_swin-demo.pth"
    if ground == "plain":
        return plain
    stressed = work_dir / "stressed" / f"{detector}.pth"
    if not stressed.exists():
        tool = ROOT / "tools" / "stress_detector.py"
        line = [str(tool), str(config(detector)), str(plain), str(stressed), "--seed", "0"]
        run_logged(line, stressed.with_suffix(".log"))
    return stressed


def config(detector: str) -> Path:
    """The float config of a demo detector."""
    return ROOT / "configs" / "demo" / f"{detector}_swin-demo.py"


def first_val_images(number: int, work_dir: Path) -> Path:
    """Annotations of the first so many val images.

    The evaluator counts every object of its annotation file, so fewer images alone would look like missed objects.
    """
    annotations = json.loads((DATA / "annotations" / "instances_val.json").read_text())
    images = annotations["images"][:number]
    kept = {image["id"] for image in images}
    objects = [item for item in annotations["annotations"] if item["image_id"] in kept]
    path = work_dir / f"val_first-{number}.json"
    write_json(path, {**annotations, "images": images, "annotations": objects})
    return path


def command_line(spec: Spec, folder: Path, work_dir: Path, eval_float: bool) -> list[str]:
    """Arguments of ``tools/quantize_det.py`` for a run."""
    weight, activation = spec.bits[1:].split("A")
    line = [str(config(spec.detector)), str(checkpoint(spec.detector, spec.ground, work_dir))]
    line += ["--work-dir", str(folder), "--recipe", spec.recipe, "--scope", spec.scope]
    line += ["--w-bits", weight, "--a-bits", activation, "--num-calib", str(spec.num_calib)]
    line += ["--seed", str(spec.seed), "--device", "cpu"]
    # a finished run is made again from the start: its recipe may have changed since
    line += [] if (folder / STATES / FINISHED).exists() else ["--resume"]
    line += ["--eval-float"] if eval_float else []
    options = dict(spec.options)
    if spec.num_val is not None:
        path = str(first_val_images(spec.num_val, work_dir))
        options |= {"test_dataloader.dataset.ann_file": path, "test_evaluator.ann_file": path}
    pairs = [f"{key}={value}".replace(" ", "") for key, value in options.items()]
    return [*line, "--cfg-options", *pairs] if pairs else line


def cpu_model() -> str:
    """What the machine calls its processor."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def revision() -> str | None:
    """The commit, with ``-dirty`` where what is measured has been changed since; None outside of a git repository."""
    git, measured = ["git", "-C", str(ROOT)], ["apq_mmdet", "configs", "tools"]
    lines = ([*git, "rev-parse", "--short", "HEAD"], [*git, "status", "--porcelain", "--", *measured])
    try:
        commit, changes = (subprocess.run(line, capture_output=True, text=True, check=True).stdout for line in lines)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("-dirty" if changes else "")


def execute(spec: Spec, work_dir: Path, eval_float: bool) -> dict[str, Any]:
    """Make one run; returns its row.

    Raises:
        RunFailedError: the run failed.
    """
    folder = (work_dir / spec.name).resolve()
    line, commit = command_line(spec, folder, work_dir.resolve(), eval_float), revision()
    run_logged([str(ROOT / "tools" / "quantize_det.py"), *line], folder / "log.txt")
    report = json.loads((folder / "report.json").read_text())
    return {
        **asdict(spec),
        "metrics": report["metrics"]["quantized"],
        "float_metrics": report["metrics"]["float"],
        "calibration_seconds": round(report["calibration_seconds"], 1),
        "seconds": round(report["seconds"], 1),
        "threads": report["threads"],
        "cpu": cpu_model(),
        "peak_memory_bytes": report["peak_memory"]["host_bytes"],
        "checkpoint_bytes": report["sizes"]["quantized_checkpoint_bytes"],
        "versions": report["versions"],
        "commit": commit,
        "finished": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


# -- all runs -------------------------------------------------------------------------------------------------


def needs_float(spec: Spec, rows: Sequence[dict[str, Any]]) -> bool:
    """Whether no row tells the float AP of this run's checkpoint and images yet."""
    known = [Spec.from_row(row) for row in rows if row["float_metrics"]]
    return not any((s.detector, s.ground, s.num_val) == (spec.detector, spec.ground, spec.num_val) for s in known)


def run_missing(
    specs: Sequence[Spec],
    out: Path,
    run: Callable[[Spec, bool], dict[str, Any]],
    limit_seconds: float = float("inf"),
) -> list[Spec]:
    """Make the runs that ``out`` lacks, each appended to it when it is done; returns those that failed.

    Args:
        specs: in the order in which they are made.
        out: file of rows.
        run: makes a run, with float AP beside it or without, and returns its row.
        limit_seconds: no run starts later than so long after the first.
    """
    start, failed = time.perf_counter(), []
    rows = read_rows(out)
    waiting = missing(specs, rows)
    for number, spec in enumerate(waiting, 1):
        if time.perf_counter() - start > limit_seconds:
            print(f"time is up, {len(waiting) - number + 1} runs are left", flush=True)
            break
        print(f"[{number}/{len(waiting)}] {spec.name}", end=" ", flush=True)
        try:
            row = run(spec, needs_float(spec, rows))
        except RunFailedError as error:
            failed.append(spec)
            print(f"FAILED: {error}", flush=True)
            continue
        rows.append(row)
        append_row(out, row)
        print(box_and_mask([row]), f"{row['calibration_seconds']:.0f} s", flush=True)
    return failed


def print_plan(specs: Sequence[Spec], rows: Sequence[dict[str, Any]]) -> None:
    """List the missing runs with their expected time."""
    waiting = missing(specs, rows)
    times = [expected_seconds(spec, rows) for spec in waiting]
    for spec, seconds in zip(waiting, times, strict=True):
        told = "time unknown" if seconds is None else f"{seconds / 60:.1f} min"
        print(f"{spec.name}: {told}")
    known = [seconds for seconds in times if seconds is not None]
    unknown = f", and {len(times) - len(known)} of unknown time" if len(known) < len(times) else ""
    print(f"{len(waiting)} of {len(specs)} runs are missing: {sum(known) / 3600:.1f} h for {len(known)}{unknown}")


def main(argv: list[str] | None = None) -> int:
    """Run what is missing, then report; returns the exit code."""
    args = parse_args(argv)
    failed: list[Spec] = []
    try:
        specs = chosen_specs(args)
        if not (args.report or args.dry_run or DATA.is_dir()):
            raise BadInputError(f"{DATA} does not exist; make it with: python tools/make_demo_data.py --out data/demo")
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.dry_run:
        print_plan(specs, read_rows(args.out))
        return 0
    if not args.report:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the run in progress too
        limit = float("inf") if args.limit_minutes is None else 60 * args.limit_minutes
        failed = run_missing(specs, args.out, lambda spec, also: execute(spec, args.work_dir, also), limit)
    rows = read_rows(args.out)
    draw_plots(rows, args.docs / "images")
    write_report(rows, args.docs / "results.md", RESULTS)
    print(f"{len(rows)} runs in {args.out}, report in {args.docs / 'results.md'}")
    for spec in failed:
        print(f"failed: {spec.name}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
