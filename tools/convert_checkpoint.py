"""Convert a foreign detector's checkpoint into one that mmdet 3 loads strictly.

Takes detectors of Microsoft's Swin-Transformer-Object-Detection and of mmdet 2.x, and tells them apart by itself.
"""

import argparse
import sys
from pathlib import Path

from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.foreign_checkpoints import convert_file


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="exit codes: 0 success, 2 bad input found before work, 1 failure in it",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint to convert")
    parser.add_argument("target", metavar="DST", type=Path, help="checkpoint to write")
    parser.add_argument("--config", help="config of the float detector, which the result must fit key by key")
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> None:
    """Convert, and print what became of the keys.

    Raises:
        BadInputError: nothing that is converted here, or it does not fit the config.
    """
    conversion = convert_file(args.source, args.target, args.config)
    print(f"{args.source}: {conversion.summary()}")
    if args.config:
        print(f"fits {args.config}")
    print(f"{args.target} written")


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_args(argv)
    return exit_code_of(lambda: convert(args))


if __name__ == "__main__":
    sys.exit(main())
