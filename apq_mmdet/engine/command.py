"""The logic of ``tools/quantize_det.py``: from its options to a run, and from errors to exit codes."""

import argparse
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import mmengine.device.utils
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.runner import Runner
from torch import nn

from apq_mmdet.engine.checkpoint import CHECKPOINT
from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.float_config import config_files, read_config
from apq_mmdet.engine.options import (
    KeyValues,
    add_bits,
    check_memory_budget,
    check_seed,
    check_work_dir,
    chosen_bits,
    merge_options,
    refuse_foreign_config,
    refuse_idle_keys,
    refuse_overwriting,
)
from apq_mmdet.engine.quantized_config import (
    CONFIG,
    RUN_CONFIG,
    quantized_config,
    read_recipe,
    standalone_config,
    with_ptq_loop,
)
from apq_mmdet.errors import BadInputError
from apq_mmdet.policy import SCOPES
from apq_mmdet.report import REPORT

LONGEST_WAIT = 2 * 3600  # seconds that a process waits for the others
# variables by which each launcher tells a process its rank, the number of processes, and its rank on its node
LAUNCHER_VARIABLES = {
    "pytorch": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
}
LAUNCHER_COMMANDS = {"pytorch": "torchrun", "slurm": "srun", "mpi": "mpirun"}
# what building a model or a work dir raises where the config is wrong or a package that it needs is missing
CANNOT_BE_BUILT = (TypeError, ValueError, KeyError, AssertionError, RuntimeError, ImportError, OSError)

# keys of a config that the command sets by itself, and what sets them
OWN_OPTIONS = {
    "work_dir": "use --work-dir",
    "launcher": "use --launcher",
    "resume": "use --resume",
    "load_from": "the checkpoint is the second argument",
    "randomness.seed": "use --seed",
    "test_cfg.type": "the command has a test loop of its own",
}

EPILOG = """
examples:
  W4A4 backbone of a float detector, float AP beside it:
    python tools/quantize_det.py CONFIG CHECKPOINT --recipe apq_plus --w-bits 4 --a-bits 4 --eval-float --work-dir DIR
  the whole detector, calibrated on a folder of images without annotations, no evaluation:
    python tools/quantize_det.py CONFIG CHECKPOINT --scope detector --calib-dir IMAGES --no-eval --work-dir DIR
  leave a layer float (any key of the quant dict can be set):
    ... --cfg-options model.quant.overrides.mine.pattern='*patch_embed.projection' model.quant.overrides.mine.float=True
  two processes, each with half of the images; the same bytes as one process with as many threads:
    torchrun --nproc-per-node 2 tools/quantize_det.py CONFIG CHECKPOINT --launcher pytorch --work-dir DIR
  what a run would do, about how long and with how much memory, without doing it:
    ... --dry-run
  afterwards, with mmdet's own unmodified tool:
    python <mmdet>/.mim/tools/test.py DIR/config.py DIR/quantized.pth

exit codes: 0 success, 2 bad input found before work, 1 failure in it
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description="Quantize a float detector of MMDetection after training, and measure its AP. The result "
        "simulates integer arithmetic: it is small on disk and exact in its AP, but slower than float.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", help="config of the float detector (or one that inherits a recipe)")
    add("checkpoint", help="its float checkpoint")
    add("--work-dir", required=True, help="folder for quantized.pth, config.py and report.json")
    add(
        "--recipe",
        help="name in configs/_base_/recipes or path (default: the config's own, or apq_plus); bits, scope "
        "and overrides of a config that is quantized already stay",
    )
    add_bits(parser)
    add("--scope", choices=SCOPES, help="what is quantized (default: the recipe's, backbone)")
    add("--num-calib", type=int, default=32, help="calibration images (default: 32)")
    add("--calib-dir", help="folder of calibration images (default: images of the config's training set)")
    add("--cfg-options", nargs="+", action=KeyValues, help="key=value pairs merged into the config")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="chooses the calibration images (default: 0)")
    add("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none", help="job launcher")
    add("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    add(
        "--memory-budget",
        type=float,
        default=4.0,
        metavar="GIB",
        help="memory that calibration may take above the "
        "model's own, for each process; what does not fit goes to the work dir (default: 4)",
    )
    add("--dry-run", action="store_true", help="check everything, print what would be done and its cost, and stop")
    add("--resume", action="store_true", help="go on with a killed run of the same command")
    add("--allow-overlap", action="store_true", help="calibrate on evaluated images: AP is then that of seen images")
    add("--no-eval", action="store_true", help="do not measure the quantized model")
    add("--eval-float", action="store_true", help="measure the float model too")
    return parser


def build_config(args: argparse.Namespace) -> Config:
    """The config of the run.

    Raises:
        BadInputError: the config cannot be read, or an option does not fit it.
    """
    settings: dict[str, Any] = chosen_bits(args)
    memory_budget = check_memory_budget(args.memory_budget)
    check_seed(args.seed)
    check_work_dir(args.work_dir)
    refuse_idle_keys(args.cfg_options, lambda key: key.startswith("quant."), "write model.quant.{}")
    refuse_idle_keys(args.cfg_options, lambda key: key.partition(".")[0] == "data_preprocessor", "write model.{}")
    for key, right in OWN_OPTIONS.items():
        refuse_idle_keys(args.cfg_options, lambda given, key=key: f"{given}.".startswith(f"{key}."), right)
    if args.scope:
        settings["scope"] = args.scope
    given = read_config(args.config)
    check_outputs(args, given)
    cfg = quantized_config(given, args.recipe, settings)
    merge_options(cfg, args.cfg_options)
    if not cfg.get("test_dataloader"):
        raise BadInputError("the config has no test_dataloader; its test pipeline prepares calibration images too")
    if not cfg.get("test_evaluator"):
        if not args.no_eval or args.eval_float:
            raise BadInputError("the config has no test_evaluator; use --no-eval to quantize without measuring AP")
        cfg.test_evaluator = []  # a Runner asks for one, of which nothing is built
    standalone_config(cfg, [])  # whatever cannot be written is told now
    cfg.work_dir = args.work_dir
    cfg.launcher = args.launcher
    cfg.load_from, cfg.resume = None, False
    cfg.randomness = {**(cfg.get("randomness") or {}), "seed": args.seed}
    cfg = with_ptq_loop(
        cfg,
        checkpoint=args.checkpoint,
        num_calib=args.num_calib,
        calib_dir=args.calib_dir,
        seed=args.seed,
        evaluate=not args.no_eval,
        eval_float=args.eval_float,
        resume=args.resume,
        memory_budget=memory_budget,
        dry_run=args.dry_run,
        allow_overlap=args.allow_overlap,
    )
    return Config(cfg.to_dict(), cfg_text=f"# made from {args.config}", filename=RUN_CONFIG)


def check_outputs(args: argparse.Namespace, cfg: Config) -> None:
    """Raise BadInputError where the run would overwrite what is not of a run: a file that it reads, or a config.

    Args:
        args: the command's options.
        cfg: the config as it was read.
    """
    out = Path(args.work_dir)
    read = [args.checkpoint, *config_files(cfg), *(config_files(read_recipe(args.recipe)) if args.recipe else [])]
    refuse_overwriting([out / name for name in (CONFIG, RUN_CONFIG, CHECKPOINT, REPORT)], read, "--work-dir")
    refuse_foreign_config(out, "--work-dir")


def choose_device(device: str | None) -> None:
    """Make mmengine's Runner use ``device``; None leaves it mmengine's choice, CUDA where there is one."""
    if device is None:
        if get_device() == "mps":  # which has no float64
            mmengine.device.utils.DEVICE = "cpu"
        return
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", device):
        raise BadInputError(f"--device must be cpu, cuda or cuda:N, got {device!r}")
    if device != "cpu":
        index = torch.device(device).index or 0
        if index >= torch.cuda.device_count():
            raise BadInputError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices")
        torch.cuda.set_device(index)
    # mmengine has no other way to choose: its Runner asks get_device(), which returns this
    mmengine.device.utils.DEVICE = device.split(":")[0]


def prepare_launcher(cfg: Config) -> None:
    """Let several processes calibrate and evaluate together.

    mmengine starts process groups with CUDA only. On a CPU the group is made here, and the model wrapped without
    devices.

    Raises:
        BadInputError: the process was not started by the launcher, or by one that was not named.
    """
    if cfg.launcher == "none":
        given = [os.environ.get(name, "") for name in LAUNCHER_VARIABLES["pytorch"]]
        if all(map(str.isdigit, given)) and int(os.environ["WORLD_SIZE"]) > 1:
            raise BadInputError("one of several processes that torchrun has started: add --launcher pytorch")
        return
    names = LAUNCHER_VARIABLES[cfg.launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        starter = LAUNCHER_COMMANDS[cfg.launcher]
        raise BadInputError(f"--launcher {cfg.launcher}: {missing[0]} is not set; start the command with {starter}")
    if get_device() != "cpu":
        dist_cfg = {**cfg.get("env_cfg", {}).get("dist_cfg", dict(backend="nccl")), "timeout": LONGEST_WAIT}
        cfg.env_cfg = {**cfg.get("env_cfg", {}), "dist_cfg": dist_cfg}
        return
    for name, given in zip(LAUNCHER_VARIABLES["pytorch"], names, strict=True):
        os.environ[name] = os.environ[given]
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # of several nodes the user has to say which is the first
    os.environ.setdefault("MASTER_PORT", "29500")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=LONGEST_WAIT))
    cfg.model_wrapper_cfg = dict(type="MMDistributedDataParallel", device_ids=None)


def leave_launcher(cfg: Config) -> None:
    """End the process group, whose threads can abort a process that exits before them.

    For the end of a success. Where another process has died, this one has a message and an exit code of its own.
    """
    if cfg.launcher != "none":
        torch.distributed.destroy_process_group()


class _Runner(Runner):
    """Leaves the config in the work dir alone until the run has weights to go with it; see PTQLoop."""

    def dump_config(self) -> None:
        """Nothing: the log holds the config of runs that come to nothing."""

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Of several processes on a CPU, too, without SyncBN, which torch's wrapper takes on GPUs only.

        In evaluation it is what BN is.
        """
        return super().wrap_model(model_wrapper_cfg, revert_sync_batchnorm(model) if get_device() == "cpu" else model)


def build_runner(cfg: Config) -> Runner:
    """The Runner with the quantized model.

    Raises:
        BadInputError: the model cannot be built from the config, or the work dir cannot be made.
    """
    try:
        return _Runner.from_cfg(cfg)
    except BadInputError:
        raise
    except CANNOT_BE_BUILT as error:
        raise BadInputError(f"the config cannot be built: {type(error).__name__}: {error}") from error


def run(args: argparse.Namespace) -> dict[str, float]:
    """Quantize; returns the quantized model's metrics."""
    if not Path(args.config).is_file():
        raise BadInputError(f"config {args.config} does not exist")
    if not Path(args.checkpoint).is_file():
        raise BadInputError(f"checkpoint {args.checkpoint} does not exist")
    choose_device(args.device)
    cfg = build_config(args)
    prepare_launcher(cfg)
    metrics = build_runner(cfg).test()
    leave_launcher(cfg)
    return metrics


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = build_parser().parse_args(argv)
    if args.local_rank is not None:  # how old launchers tell it
        os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    return exit_code_of(lambda: run(args))
