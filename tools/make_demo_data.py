"""Draw the demo data set: ``python tools/make_demo_data.py --out data/demo``."""

import argparse
import sys
from pathlib import Path

from apq_mmdet.datasets import write_demo_set
from apq_mmdet.datasets.preview import contact_sheet
from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.options import check_seed
from apq_mmdet.errors import BadInputError


def parse_args() -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to create")
    parser.add_argument("--seed", type=int, default=0, help="determines every image")
    parser.add_argument("--num-train", type=int, default=4000, help="images of the train split")
    parser.add_argument("--num-val", type=int, default=400, help="images of the val split")
    parser.add_argument("--workers", type=int, default=2, help="drawing processes; the result does not depend on it")
    parser.add_argument("--preview", type=Path, help="only write a contact sheet of val images to this file")
    return parser.parse_args()


def main() -> None:
    """Draw the set, or say that it is there."""
    args = parse_args()
    sys.exit(exit_code_of(lambda: write(args)))


def write(args: argparse.Namespace) -> None:
    """The set, or a preview of it."""
    check_seed(args.seed)
    if args.preview:
        contact_sheet(args.preview, args.seed)
        return
    for option in ("num_train", "num_val", "workers"):
        if getattr(args, option) < 1:
            raise BadInputError(f"--{option.replace('_', '-')} must be at least 1, got {getattr(args, option)}")
    written = write_demo_set(args.out, args.seed, args.num_train, args.num_val, args.workers)
    print(f"{args.out}: {'written' if written else 'already complete, nothing to do'}")


if __name__ == "__main__":
    main()
