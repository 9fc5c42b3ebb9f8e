"""Measures a float detector; a process of its own, as ``tools/quantize_det.py`` is for a row.

    python -m apq_mmdet.reproduction.float_ap CONFIG CHECKPOINT --work-dir DIR

writes ``DIR/report.json``.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper

import apq_mmdet
from apq_mmdet.engine.checkpoint import load_float_weights
from apq_mmdet.engine.command import build_runner, choose_device, leave_launcher, prepare_launcher
from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.float_config import read_config
from apq_mmdet.files import write_json


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="config of the float detector")
    parser.add_argument("checkpoint", help="its checkpoint")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    parser.add_argument("--launcher", choices=("none", "pytorch"), default="none")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace) -> None:
    """Evaluate, and write the report.

    Raises:
        BadInputError: the config or the checkpoint cannot be used.
    """
    choose_device(args.device)
    cfg = read_config(args.config)
    cfg.work_dir, cfg.launcher = str(args.work_dir), args.launcher
    cfg.load_from, cfg.resume = None, False
    prepare_launcher(cfg)
    runner = build_runner(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    load_float_weights(model, args.checkpoint)
    start = time.perf_counter()
    metrics = runner.test()
    report = {
        "metrics": {"float": metrics},
        "versions": {"apq_mmdet": apq_mmdet.__version__, **apq_mmdet.versions.imported_versions()},
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - start,
    }
    if is_main_process():
        write_json(args.work_dir / "report.json", report)
    leave_launcher(cfg)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; returns its exit code."""
    args = parse_args(argv)
    return exit_code_of(lambda: measure(args))


if __name__ == "__main__":
    sys.exit(main())
