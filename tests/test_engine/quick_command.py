"""tools/quantize_det.py as the tests of it call it."""

from pathlib import Path

from helpers import CHECKPOINT

from apq_mmdet.engine import command

RECIPE = Path(__file__).with_name("quick_recipe.py")
QUICK = ["--recipe", str(RECIPE), "--w-bits", "4", "--a-bits", "4", "--num-calib", "2", "--device", "cpu"]


def quantize(config, work_dir, *options):
    """The command's exit code."""
    return command.main([str(config), str(CHECKPOINT), "--work-dir", str(work_dir), *QUICK, *map(str, options)])
