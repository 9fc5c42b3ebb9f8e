"""Kill a calibration with SIGKILL at random points, resume it, and compare the result byte by byte.

python tools/make_demo_data.py --out data/demo
python benchmarks/calibration/kill_trial.py [--kills 10] [--processes 1]
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=10)
    add("--processes", type=int, default=1)
    add("--num-calib", type=int, default=4)
    add("--recipe", default="apq_plus")
    add("--bits", type=int, default=3, help="of weights and activations (default: 3, at which apq_plus learns codes)")
    add("--seed", type=int, default=0, help="of the points in time")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--work-dir", type=Path, default=Path("work_dirs/kill_trial"))
    add("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_trial.json")
    return parser.parse_args()


def command(work_dir: Path, args: argparse.Namespace, *options: str) -> list[str]:
    """A calibration of the demo detector without evaluation."""
    start = [sys.executable]
    if args.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={args.processes}"]
    name = "mask-rcnn_swin-demo"
    job = [
        str(ROOT / "tools" / "quantize_det.py"),
        str(ROOT / f"configs/demo/{name}.py"),
        str(ROOT / f"demo/{name}.pth"),
    ]
    bits = str(args.bits)
    job += ["--recipe", args.recipe, "--w-bits", bits, "--a-bits", bits, "--num-calib", str(args.num_calib)]
    job += ["--no-eval", "--device", args.device, "--work-dir", str(work_dir), *options]
    return [*start, *job, *(["--launcher", "pytorch"] if args.processes > 1 else [])]


def run(line: list[str], kill_after: float | None) -> bool:
    """Run a command; False if it was killed before its end."""
    child = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        code = child.wait(kill_after)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # all processes of the run
        child.wait()
        return False
    if code:
        raise SystemExit(f"the calibration failed with exit code {code}: {' '.join(line)}")
    return True


def main() -> None:
    """One undisturbed run, then runs that are killed and resumed until the number of kills is reached."""
    args = parse_args()
    if args.work_dir.exists() and not all(
        path.name == "whole" or path.match("trial_*") for path in args.work_dir.iterdir()
    ):
        raise SystemExit(f"--work-dir {args.work_dir} holds something other than a trial; name another folder")
    shutil.rmtree(args.work_dir, ignore_errors=True)
    start = time.perf_counter()
    run(command(args.work_dir / "whole", args), None)
    seconds = time.perf_counter() - start
    want = (args.work_dir / "whole" / "quantized.pth").read_bytes()
    points, kills, trials, equal = random.Random(args.seed), [], 0, 0
    while len(kills) < args.kills:
        trials += 1
        folder = args.work_dir / f"trial_{trials}"
        for _ in range(3):  # up to three kills of one calibration
            after = points.uniform(0.1, 0.9) * seconds
            if run(command(folder, args, "--resume"), after):
                break
            finished = len(list((folder / "calibration").glob("*.pth")))
            kills.append({"trial": trials, "seconds": round(after, 1), "blocks_on_disk": finished})
            print(kills[-1], flush=True)
        run(command(folder, args, "--resume"), None)
        same = (folder / "quantized.pth").read_bytes() == want
        equal += same
        print(f"trial {trials}: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
    summary = {
        "command": command(Path("DIR"), args, "--resume")[1:],
        "undisturbed_seconds": round(seconds, 1),
        "kills": kills,
        "trials": trials,
        "trials_with_the_same_bytes": equal,
    }
    summary["command"] = [str(part).replace(f"{ROOT}/", "") for part in summary["command"]]
    args.out.write_text(json.dumps(summary, indent=1) + "\n")
    if equal != trials:
        raise SystemExit(f"{trials - equal} of {trials} trials gave other bytes")


if __name__ == "__main__":
    main()
