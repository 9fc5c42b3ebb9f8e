"""Peak memory and time of a calibration over the number of images: memory must not grow, time at most linearly.

    python benchmarks/official_config.py --data-root COCO        # writes work_dirs/official_config/float.{py,pth}
    python benchmarks/calibration/memory.py work_dirs/official_config/float.py work_dirs/official_config/float.pth \\
        --images FOLDER [FOLDER ...] --num-calib 8 32 128

Each run is a process of its own; one more without a search gives the model's own peak, float inference included. Of
a run with one process, on Linux, the anonymous memory is looked at ten times a second: the least of the run's third
quarter, in the midst of the blocks, is what it holds between one step and the next, beside which the peak is for a
moment.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("config")
    add("checkpoint")
    add("--images", nargs="+", type=Path, required=True, help="folders of images, used together")
    add("--num-calib", nargs="+", type=int, default=[8, 32, 128])
    add("--recipe", default="apq_fast")
    add("--memory-budget", type=float, default=4.0, metavar="GIB")
    add("--cfg-options", nargs="+", default=[])
    add("--processes", type=int, default=1)
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--work-dir", type=Path, default=Path("work_dirs/memory"))
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory.json")
    return parser.parse_args()


def held_memory(process: subprocess.Popen) -> float | None:
    """Wait for a process; the least anonymous memory in the third quarter of its run, GiB; None where nobody knows."""
    seen = []
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status")
        found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
        seen += [int(found[1]) / 2**20] if found else []
        time.sleep(0.1)
    midst = seen[len(seen) // 2 : len(seen) * 3 // 4]
    return round(min(midst), 2) if midst else None


def run(args: argparse.Namespace, images: Path, recipe: str, number: int) -> dict[str, Any]:
    """One calibration without evaluation."""
    folder = args.work_dir / f"{recipe}_{number}"
    start = [sys.executable]
    if args.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    line = [*start, str(ROOT / "tools" / "quantize_det.py"), args.config, args.checkpoint, "--no-eval"]
    line += ["--work-dir", str(folder), "--recipe", recipe, "--num-calib", str(number), "--calib-dir", str(images)]
    line += ["--w-bits", "4", "--a-bits", "4", "--device", args.device, "--memory-budget", str(args.memory_budget)]
    # what changes a search would give the model's own run one
    options = [o for o in args.cfg_options if recipe == args.recipe or not o.startswith("model.quant.")]
    line += ["--cfg-options", *options] if options else []
    line += ["--launcher", "pytorch"] if args.processes > 1 else []
    with (args.work_dir / f"{recipe}_{number}.log").open("w") as log:
        process = subprocess.Popen(line, stdout=log, stderr=log)
        held = held_memory(process)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}, log in {log.name}")
    report = json.loads((folder / "report.json").read_text())
    return {
        "recipe": recipe,
        "images": number,
        "processes": args.processes,
        "threads": report["threads"],
        "peak_gib": round(report["peak_memory"]["host_bytes"] / 2**30, 2),
        "held_gib": held if args.processes == 1 else None,
        "calibration_seconds": round(report["calibration_seconds"], 1),
        "search_seconds": round(sum(block["seconds"] for block in report["blocks"]), 1),
    }


def main() -> None:
    """The model alone, then every number of images."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="images_", dir=args.work_dir) as pool:
        link_images(args.images, Path(pool))
        measure(args, Path(pool))


def link_images(folders: list[Path], pool: Path) -> None:
    """Links to the images of all folders, in one folder."""
    for number, folder in enumerate(folders):
        for image in folder.resolve().iterdir():
            (pool / f"{number}_{image.name}").symlink_to(image)


def measure(args: argparse.Namespace, pool: Path) -> None:
    """Run and write."""
    rows = [run(args, pool, "minmax", args.num_calib[0])]
    for number in args.num_calib:
        rows.append(run(args, pool, args.recipe, number))
        rows[-1]["above_the_models_own_gib"] = round(rows[-1]["peak_gib"] - rows[0]["peak_gib"], 2)
        print(rows[-1], flush=True)
        args.out.write_text(json.dumps({"memory_budget_gib": args.memory_budget, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
