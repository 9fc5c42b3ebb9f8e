"""How far the range factors that two calibrations chose are apart.

    python tools/quantize_det.py CONFIG CHECKPOINT --recipe apq --w-bits 4 --a-bits 4 --num-calib 8 --work-dir EXACT
    python tools/quantize_det.py CONFIG CHECKPOINT --recipe apq_fast --w-bits 4 --a-bits 4 --num-calib 8 --work-dir FAST
    python benchmarks/calibration/choices.py EXACT FAST

Both work dirs are of the same detector and scope; every further one is compared with the first.
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median


def factors(work_dir: Path) -> dict[str, float]:
    """Range factors that a run chose, by layer and role; variants of formats, which are no factors, are left out."""
    blocks = json.loads((work_dir / "report.json").read_text())["blocks"]
    found = {f"{block['block']}.{name}": factor for block in blocks for name, factor in block["factors"].items()}
    return {name: factor for name, factor in found.items() if not name.endswith(".variant")}


def main() -> None:
    """Print a line for each work dir but the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="work dir of the run that the others are compared with")
    parser.add_argument("others", type=Path, nargs="+", help="work dirs of other runs")
    args = parser.parse_args()
    first = factors(args.first)
    for work_dir in args.others:
        other = factors(work_dir)
        if other.keys() != first.keys():
            parser.error(f"{work_dir} has other ranges than {args.first}: not the same detector, scope and formats")
        apart = [abs(first[name] - other[name]) for name in first]
        changed = sum(distance > 0 for distance in apart)
        distances = f"{mean(apart):.3f} on average, median {median(apart):.3f}"
        print(f"{work_dir}: {changed} of {len(apart)} ranges differ; {distances} apart")


if __name__ == "__main__":
    main()
