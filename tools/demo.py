"""``make demo``: quantize the demo Mask R-CNN to 8, 6 and 4 bits and print its AP beside float."""

import argparse
import contextlib
import json
import shutil
import sys
import time
from pathlib import Path

from apq_mmdet.checks import check_whole
from apq_mmdet.datasets import write_demo_set
from apq_mmdet.engine import command
from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.run_record import STATES
from apq_mmdet.locks import lock

ROOT = Path(__file__).resolve().parents[1]
BITS = (8, 6, 4)
RECIPE = "apq_plus"


def parse_args() -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--detector", choices=("mask-rcnn", "cascade-mask-rcnn"), default="mask-rcnn", help="default: %(default)s"
    )
    parser.add_argument(
        "--num-val",
        type=int,
        default=100,
        help="evaluate the first so many images of the val split (default: %(default)s)",
    )
    parser.add_argument(
        "--num-calib", type=int, default=16, help="calibration images, from the train split (default: %(default)s)"
    )
    parser.add_argument("--work-dir", type=Path, default=ROOT / "work_dirs" / "demo", help="default: work_dirs/demo")
    return parser.parse_args()


def write_config(path: Path, float_config: Path, data: Path) -> None:
    """A float config on the data set in ``data``."""
    root = f"{data.resolve()}/"
    path.write_text(
        f"_base_ = {str(float_config)!r}\n"
        f"train_dataloader = dict(dataset=dict(data_root={root!r}))\n"
        f"test_dataloader = dict(dataset=dict(data_root={root!r}))\n"
        f"test_evaluator = dict(ann_file={root + 'annotations/instances_val.json'!r})\n"
    )


def row(name: str, metrics: dict[str, float], mib: float, seconds: float | None) -> str:
    """One line of the table; mmdet gives no AP of a model that detects nothing."""
    cells = [name.ljust(8)]
    for task in ("bbox", "segm"):
        cells += [f"{100 * metrics.get(f'coco/{task}_{item}', 0.0):7.1f}" for item in ("mAP", "mAP_50")]
    return "  ".join([*cells, f"{mib:8.1f}", "        -" if seconds is None else f"{seconds:8.0f}s"])


def main() -> None:
    """Run the demo."""
    args = parse_args()
    sys.exit(exit_code_of(lambda: demonstrate(args)))


def demonstrate(args: argparse.Namespace) -> None:
    """Quantize, and print the table.

    Raises:
        BadInputError: a number that is not positive, a work dir whose ``data`` is something else, or in which another
            demo is running.
        SystemExit: a quantization failed; its log says why.
    """
    for option in ("num_val", "num_calib"):
        check_whole(getattr(args, option), f"--{option.replace('_', '-')}", 1)
    start = time.perf_counter()
    with lock(args.work_dir, f"another demo is running in {args.work_dir}: wait or use another --work-dir"):
        _quantize_and_print(args, start)


def _quantize_and_print(args: argparse.Namespace, start: float) -> None:
    data = args.work_dir / "data"
    write_demo_set(data, seed=0, num_train=max(args.num_calib, 32), num_val=args.num_val, workers=2)
    name = f"{args.detector}_swin-demo"
    config, checkpoint = args.work_dir / f"demo_{name}.py", ROOT / "demo" / f"{name}.pth"
    write_config(config, ROOT / "configs" / "demo" / f"{name}.py", data)
    rows = []
    for bits in BITS:
        out = args.work_dir / f"w{bits}a{bits}"
        print(f"== W{bits}A{bits}, log in {out}/log.txt", flush=True)
        options = [str(config), str(checkpoint), "--work-dir", str(out)]
        options += ["--recipe", RECIPE, "--w-bits", str(bits), "--a-bits", str(bits)]
        options += ["--num-calib", str(args.num_calib)]
        shutil.rmtree(out / STATES, ignore_errors=True)  # of a demo that was broken off
        out.mkdir(parents=True, exist_ok=True)
        with (out / "log.txt").open("w") as log, contextlib.redirect_stdout(log):
            code = command.main(options if rows else [*options, "--eval-float"])
        if code:
            sys.exit(code)
        report = json.loads((out / "report.json").read_text())
        sizes = {kind: value / 2**20 for kind, value in report["sizes"].items()}
        if not rows:
            rows.append(row("float", report["metrics"]["float"], sizes["float_checkpoint_bytes"], None))
        seconds = report["calibration_seconds"]
        rows.append(
            row(f"W{bits}A{bits}", report["metrics"]["quantized"], sizes["quantized_checkpoint_bytes"], seconds)
        )
    print(f"\n{args.detector}, Swin backbone quantized by {RECIPE} on {args.num_calib} train images,")
    print(f"AP on the first {args.num_val} images of the val split; {time.perf_counter() - start:.0f} s in all\n")
    print("bits       box AP     AP50  mask AP     AP50       MiB  calibration")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
