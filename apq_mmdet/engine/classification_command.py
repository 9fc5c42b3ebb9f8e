"""The logic of ``tools/quantize_cls.py``: from its options to a run, and what the run leaves."""

import argparse
import time
from pathlib import Path
from typing import Any

from mmengine.device import get_device

import apq_mmdet
from apq_mmdet.calibration.blocks import bytes_of
from apq_mmdet.calibration.calibrator import calibrate, check_model
from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.calibration.reports import CalibrationReport
from apq_mmdet.datasets.calibration import count_overlap
from apq_mmdet.datasets.image_folder import FolderImages, ImageFolder, read_class_list
from apq_mmdet.engine.block_states import BlockStatesOnDisk
from apq_mmdet.engine.checkpoint import CHECKPOINT, META_KEY, save_quantized
from apq_mmdet.engine.classification import (
    LogitsTask,
    build_classifier,
    data_config,
    evaluate,
    load_weights,
    make_transform,
)
from apq_mmdet.engine.command import choose_device
from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.options import (
    KeyValues,
    add_bits,
    check_seed,
    check_work_dir,
    chosen_bits,
    merge_options,
    refuse_idle_keys,
    refuse_overwriting,
)
from apq_mmdet.engine.quantized_config import DEFAULT_RECIPE, read_recipe
from apq_mmdet.engine.run_record import STATES, calibration_conditions, run_report, sha256_of
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import float_only, quantize_model
from apq_mmdet.models.timm_import import import_timm
from apq_mmdet.report import remove_report, render_table, write_report

SIZES = {"img_size", "patch_size", "window_size"}  # arguments of models for which timm resamples embeddings
EPILOG = """
examples:
  W4A4 of a checkpoint of your own, float accuracy beside it:
    python tools/quantize_cls.py deit_tiny_patch16_224 --checkpoint FILE --calib-dir ROOT/train --val-dir ROOT/val
        --w-bits 4 --a-bits 4 --eval-float --work-dir DIR
  with the weights that timm downloads:
    ... vit_small_patch16_224 --pretrained ...
  a model of another shape:
    ... --model-args num_classes=100 img_size=384
  the last layer at 8 bits, the images of the patch embedding float (any key of the quant dict can be set):
    ... --cfg-options quant.overrides.head.pattern='head*' quant.overrides.head.bits=8
        quant.overrides.images.pattern='*patch_embed.proj' quant.overrides.images.input=None
  afterwards, in Python:
    from apq_mmdet.engine.classification import load_classifier
    classifier = load_classifier("DIR")

exit codes: 0 success, 2 bad input found before work, 1 failure in it
"""


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description="Quantize an image classifier of timm after training, and measure its top-1 accuracy. The result "
        "simulates integer arithmetic: it is small on disk and exact in its accuracy, but slower than float.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", help="timm's name of the model, such as vit_small_patch16_224 or swin_tiny_patch4_window7_224")
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--checkpoint", help="float checkpoint, .pth or .safetensors")
    weights.add_argument("--pretrained", action="store_true", help="let timm download its weights")
    add("--model-args", nargs="+", action=KeyValues, default={}, help="key=value arguments of timm's model")
    add("--work-dir", type=Path, required=True, help="folder for quantized.pth and report.json")
    add("--calib-dir", required=True, help="folder of calibration images, also in subfolders; no labels are read")
    add("--val-dir", help="folder of images to evaluate, ROOT/CLASS/IMAGE.jpg; classes in sorted order")
    add("--class-list", help="file with the folder names of --val-dir in the order of the model's classes, one a line")
    add("--recipe", default=DEFAULT_RECIPE, help=f"name in configs/_base_/recipes or path (default: {DEFAULT_RECIPE})")
    add_bits(parser)
    add("--cfg-options", nargs="+", action=KeyValues, help="key=value pairs merged into the recipe")
    add("--num-calib", type=int, default=32, help="calibration images (default: 32)")
    add("--batch-size", type=int, default=64, help="evaluated images that run together (default: 64)")
    add("--workers", type=int, default=2, help="processes that read evaluated images (default: 2)")
    add("--device", help="cpu or cuda (default: cuda where there is one)")
    add("--seed", type=int, default=0, help="chooses the calibration images (default: 0)")
    add("--resume", action="store_true", help="go on with a killed run of the same command")
    add("--no-eval", action="store_true", help="do not measure the quantized model")
    add("--eval-float", action="store_true", help="measure the float model too")
    return parser


def read_quant(args: argparse.Namespace) -> dict[str, Any]:
    """The ``quant`` dict of the run.

    Raises:
        BadInputError: unknown recipe, bits out of range, or an option that does not fit.
    """
    refuse_idle_keys(args.cfg_options, lambda key: not key.startswith("quant."), "write quant.{}")
    cfg = read_recipe(args.recipe)
    cfg.quant.update(chosen_bits(args))
    merge_options(cfg, args.cfg_options)
    return cfg.quant.to_dict()


class ClassificationRun:
    """Everything that can be wrong with the options is found when it is made; ``run`` does the work.

    Args:
        args: parsed options of the command.

    Raises:
        BadInputError: whatever is wrong.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.work_dir = args, args.work_dir
        choose_device(args.device)
        check_seed(args.seed)
        check_work_dir(args.work_dir)
        if args.checkpoint:
            refuse_overwriting([args.work_dir / CHECKPOINT], [args.checkpoint], "--work-dir")
        for key in ("batch_size", "workers"):
            least = int(key == "batch_size")
            if getattr(args, key) < least:
                raise BadInputError(f"--{key.replace('_', '-')} must be at least {least}, got {getattr(args, key)}")
        self.quant = read_quant(args)
        self.recipe = Recipe.from_dict(self.quant)
        self.model = build_classifier(args.model, args.model_args, args.pretrained)
        if args.checkpoint:
            load_weights(self.model, args.checkpoint, resample=not SIZES.isdisjoint(args.model_args))
        self.float_bytes = self._float_bytes()
        self.data = data_config(self.model, args.model_args)
        self.table = quantize_model(self.model, self.recipe.policy)
        check_model(self.model, self.recipe)
        self.model.to(get_device())
        transform = make_transform(self.data)
        self.images = FolderImages(args.calib_dir, args.num_calib, args.seed, transform)
        self.images.check()
        self.evaluated = self._evaluated(transform) if args.eval_float or not args.no_eval else None
        self.description = self._describe()
        self.states = BlockStatesOnDisk(
            self.work_dir / STATES, {**self.description, **self._describe_conditions()}, args.resume
        )

    def _float_bytes(self) -> int:
        if self.args.checkpoint:
            return Path(self.args.checkpoint).stat().st_size
        return bytes_of(self.model.state_dict())

    def _evaluated(self, transform: Any) -> ImageFolder:
        if not self.args.val_dir:
            raise BadInputError("--val-dir is needed to measure accuracy; or use --no-eval")
        classes = read_class_list(self.args.class_list) if self.args.class_list else None
        images = ImageFolder(self.args.val_dir, transform, classes)
        if len(images.classes) != self.model.num_classes:
            where = f"class list {self.args.class_list}" if classes else f"image folder {self.args.val_dir}"
            raise BadInputError(
                f"{where} has {len(images.classes)} classes, {self.args.model} has {self.model.num_classes}; folders "
                f"of some of the classes need --class-list, another model --model-args num_classes=N"
            )
        count_overlap(self.images.paths, [path for path, _ in images.samples])
        return images

    def _describe(self) -> dict[str, Any]:
        """What was asked for."""
        args = self.args
        if args.checkpoint:
            weights = {"checkpoint_sha256": sha256_of([args.checkpoint])}
        else:
            source = self.model.pretrained_cfg
            weights = {"pretrained": {key: source.get(key) for key in ("tag", "hf_hub_id", "url")}}
        return {
            "model": args.model,
            "model_args": args.model_args,
            "quant": self.quant,
            **weights,
            "data": self.data,
            "calibration_images": self.images.ids,
            "seed": args.seed,
            "version": apq_mmdet.__version__,
        }

    def _describe_conditions(self) -> dict[str, Any]:
        """What else the bits of the result depend on."""
        return {**calibration_conditions(self.images.paths, get_device()), "timm": import_timm().__version__}

    def run(self) -> None:
        """Calibrate, save, evaluate, report."""
        start = time.perf_counter()
        print(render_table(self.table))
        float_metrics = None
        if self.args.eval_float:
            with float_only(self.model):
                float_metrics = self._measure("float model")
        report = calibrate(
            self.model,
            self.images,
            self.recipe,
            LogitsTask(),
            self.states,
            self.args.seed,
            capture_dir=self.work_dir / STATES,
        )
        self._save(report)
        metrics = None if self.args.no_eval else self._measure("quantized model")
        metrics = {"float": float_metrics, "quantized": metrics}
        write_report(self.work_dir, self._report(report, metrics, time.perf_counter() - start))
        self.states.finish()

    def _measure(self, title: str) -> dict[str, float]:
        return evaluate(self.model, self.evaluated, self.args.batch_size, self.args.workers, title)

    def _save(self, report: CalibrationReport) -> None:
        classes = self.evaluated.classes if self.evaluated else None
        described = {**self.description, "classes": classes, "left_float": report.left_float}
        remove_report(self.work_dir)  # of weights that are there no more
        save_quantized(self.model, self.work_dir / CHECKPOINT, {META_KEY: described})

    def _report(self, report: CalibrationReport, metrics: dict[str, Any], seconds: float) -> dict[str, Any]:
        made = run_report(
            recipe=self.recipe,
            scope="whole model",
            asked=self.description,
            device=get_device(),
            calibration=report,
            seconds=seconds,
            metrics=metrics,
            float_bytes=self.float_bytes,
            checkpoint=self.work_dir / CHECKPOINT,
            table=self.table,
        )
        made["versions"]["timm"] = import_timm().__version__
        return {**made, "evaluated_images": len(self.evaluated) if self.evaluated else 0}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    args = build_parser().parse_args(argv)
    return exit_code_of(lambda: ClassificationRun(args).run())
