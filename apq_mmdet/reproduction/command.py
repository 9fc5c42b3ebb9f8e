"""The logic of ``tools/reproduce_coco.py``: its options, and its exit codes."""

import argparse
import errno
import signal
import sys
from pathlib import Path
from types import FrameType

import torch

from apq_mmdet.engine.exit_codes import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_OK
from apq_mmdet.engine.options import check_memory_budget, check_seed
from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction.reproduce import StoppedError, reproduce
from apq_mmdet.reproduction.rows import INDEX, select
from apq_mmdet.reproduction.settings import Settings

EPILOG = """
examples:
  what there is to do, how long it takes, and which images it calibrates on:
    python tools/reproduce_coco.py --data-root data/coco --checkpoints checkpoints --download --dry-run
  all rows at four bits, with three seeds:
    ... --rows '*w4a4' --seeds 0 1 2
  each row on all GPUs of the machine:
    ... --launcher pytorch
A command that was stopped is repeated to go on: finished rows are kept, and within a row finished blocks.

exit codes: 0 success, 2 bad input found before work, 1 a row failed or the command was stopped
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description="Quantize the COCO detectors of model-index.yml, measure them on val2017, and write a table of "
        "published and reproduced AP.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data-root", type=Path, required=True, help="folder in COCO layout: annotations, train2017, val2017")
    add("--checkpoints", type=Path, required=True, help="folder of the float checkpoints")
    add(
        "--work-dir",
        type=Path,
        default=Path("work_dirs/reproduce_coco"),
        help="folder for the table and all results (default: %(default)s)",
    )
    add(
        "--rows", nargs="+", default=["*"], metavar="NAME", help="models, with wildcards such as '*w4a4' (default: all)"
    )
    add(
        "--num-calib",
        type=int,
        nargs="+",
        default=[32],
        help="calibration images; several make a row each (default: 32)",
    )
    add(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        help="choose the calibration images; several make a row each (default: 0)",
    )
    add("--index", type=Path, default=INDEX, help="index of the models (default: the project's model-index.yml)")
    add("--download", action="store_true", help="fetch the checkpoints that are not there")
    add("--dry-run", action="store_true", help="check everything, print the plan with its cost, and stop")
    add("--not-coco", action="store_true", help="accept other data, for a trial; nothing of it is compared")
    add("--allow-float-gap", action="store_true", help="go on where float AP is not within 0.1 of its reference")
    add("--allow-overlap", action="store_true", help="calibrate on evaluated images where the data holds them twice")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--launcher", choices=("none", "pytorch"), default="none", help="pytorch: several processes for each row")
    add("--nproc-per-node", type=int, metavar="N", help="number of these processes (default: one a GPU)")
    add("--memory-budget", type=float, default=4.0, metavar="GIB", help="of calibration, each process (default: 4)")
    return parser


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings that options ask for.

    Raises:
        BadInputError: options that do not fit each other or this machine.
    """
    if args.nproc_per_node is not None and args.launcher == "none":
        raise BadInputError("--nproc-per-node needs --launcher pytorch")
    processes = None
    if args.launcher == "pytorch":
        processes = torch.cuda.device_count() if args.nproc_per_node is None else args.nproc_per_node
        if processes < 1:
            raise BadInputError(f"--nproc-per-node must be at least 1, got {processes} (torch sees no GPU to count)")
    check_memory_budget(args.memory_budget)
    for seed in args.seeds:
        check_seed(seed, "--seeds")
    return Settings(
        data_root=args.data_root.resolve(),
        checkpoints=args.checkpoints.resolve(),
        work_dir=args.work_dir.resolve(),
        not_coco=args.not_coco,
        allow_float_gap=args.allow_float_gap,
        allow_overlap=args.allow_overlap,
        download=args.download,
        device=args.device,
        processes=processes,
        memory_budget=args.memory_budget,
    )


def run(args: argparse.Namespace) -> int:
    """Reproduce; returns the exit code."""
    settings = settings_of(args)
    selection = select(args.index.resolve(), args.rows, args.num_calib, args.seeds)
    entries = reproduce(selection, settings, args.dry_run)
    if args.dry_run:
        return EXIT_OK
    failed = [entry for entry in entries if entry.result is None]
    print(f"table: {settings.work_dir / 'table.md'}")
    for entry in failed:
        print(f"{entry.state}: {entry.item.name}")
    return EXIT_FAILED if failed else EXIT_OK


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)  # ends the row in progress too
    try:
        return run(args)
    except BadInputError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("\ninterrupted; repeat the command to go on", file=sys.stderr)
    except StoppedError as error:
        print(f"stopped: {error}", file=sys.stderr)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or f"{args.work_dir} or the temporary folder"
        print(
            f"stopped: no space left in {where}; free some and repeat the command, what is finished is kept",
            file=sys.stderr,
        )
    return EXIT_FAILED


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
