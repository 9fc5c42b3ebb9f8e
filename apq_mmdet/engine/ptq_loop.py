"""PTQLoop: a TestLoop that calibrates the model, saves it, and then evaluates it."""

import time
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner, TestLoop

import apq_mmdet
from apq_mmdet.calibration.calibrator import MEMORY_BUDGET, calibrate, check_model
from apq_mmdet.calibration.distributed import own_images, refused_together
from apq_mmdet.calibration.reports import CalibrationReport
from apq_mmdet.datasets.calibration import (
    CalibrationImages,
    calibration_from_config,
    calibration_from_folder,
    count_overlap,
    only_local,
    test_pipeline,
)
from apq_mmdet.engine.block_states import BlockStatesOnDisk, check_folder
from apq_mmdet.engine.checkpoint import CHECKPOINT, META_KEY, load_float_weights, save_quantized
from apq_mmdet.engine.options import OVERLAP_REMEDY
from apq_mmdet.engine.plan import make_plan, render_plan
from apq_mmdet.engine.quantized_config import CONFIG, RUN_CONFIG, standalone_config
from apq_mmdet.engine.run_record import STATES, calibration_conditions, run_report, sha256_of
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import map_values, plain, write_atomic
from apq_mmdet.layers import float_only
from apq_mmdet.models.distillation import detection_task
from apq_mmdet.registry import LOOPS
from apq_mmdet.report import remove_report, render_table, write_report


@LOOPS.register_module()
class PTQLoop(TestLoop):
    """Calibrates, saves ``quantized.pth`` and its configs to the work dir, evaluates, and writes ``report.json``.

    Args:
        runner, dataloader, evaluator, fp16: as for TestLoop.
        checkpoint: float checkpoint.
        num_calib: number of calibration images.
        calib_dir: folder of calibration images; None takes them from the config's training set.
        seed: chooses the images and seeds the samplers of fast recipes.
        evaluate: measure the quantized model.
        eval_float: measure the float model as well.
        resume: go on with a killed calibration.
        memory_budget: bytes that calibration may take above the model's own; what does not fit goes to the work dir.
        dry_run: make all checks, print the plan, and do nothing of it.
        allow_overlap: calibrate on evaluated images where they are asked for; the report says how many.
    """

    def __init__(
        self,
        runner: Runner,
        dataloader: Any,
        evaluator: Any,
        checkpoint: str,
        num_calib: int = 32,
        calib_dir: str | None = None,
        seed: int = 0,
        evaluate: bool = True,
        eval_float: bool = False,
        resume: bool = False,
        memory_budget: int = MEMORY_BUDGET,
        dry_run: bool = False,
        allow_overlap: bool = False,
        fp16: bool = False,
    ) -> None:
        self._runner = runner
        self.model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.seed, self.evaluate, self.eval_float = seed, evaluate, eval_float
        self.checkpoint, self.memory_budget, self.dry_run = checkpoint, memory_budget, dry_run
        self.allow_overlap, self.seen = allow_overlap, 0
        # what lies on one node may be missing on another
        self.float_meta = refused_together(partial(load_float_weights, self.model, checkpoint))
        check_model(self.model, self.model.recipe)
        if evaluate or eval_float:
            refused_together(partial(self._build_evaluation, runner, dataloader, evaluator, fp16))
        self.images = refused_together(partial(self._calibration_images, runner, num_calib, calib_dir))
        self.task = detection_task(self.model, self.model.recipe.policy.scope)
        self.work_dir = Path(runner.work_dir)
        self.run_description = self._describe_run()
        self.states = refused_together(partial(self._use_folder, resume), is_main_process())  # and it is clean
        if not dry_run:  # the nodes need not share it
            (self.work_dir / STATES).mkdir(parents=True, exist_ok=True)

    def _use_folder(self, resume: bool) -> BlockStatesOnDisk | None:
        conditions = {**self.run_description, **self._describe_conditions()}
        return (check_folder if self.dry_run else BlockStatesOnDisk)(self.work_dir / STATES, conditions, resume)

    def _build_evaluation(self, runner: Runner, dataloader: Any, evaluator: Any, fp16: bool) -> None:
        try:
            super().__init__(runner, dataloader, evaluator, fp16)
        except Exception as error:  # annotations can be wrong in any way
            raise BadInputError(
                f"the evaluation data cannot be read: {type(error).__name__}: {error}; use --no-eval to quantize "
                f"without measuring AP"
            ) from error

    def _calibration_images(self, runner: Runner, num: int, folder: str | None) -> CalibrationImages:
        if folder is None:
            images = calibration_from_config(runner.cfg, num, self.seed)
        else:
            images = calibration_from_folder(runner.cfg, folder, num, self.seed)
        images.check(own_images(len(images)))
        if self.evaluate or self.eval_float:
            evaluated = self._evaluated_paths()
            missing = next((p for p in evaluated if not Path(p).is_file()), None)
            if missing:
                raise BadInputError(f"evaluation image {missing} does not exist{only_local(missing)}")
            self.seen = count_overlap(images.paths, evaluated, self.allow_overlap, OVERLAP_REMEDY)
        return images

    def _evaluated_paths(self) -> list[str]:
        dataset = self.dataloader.dataset
        try:
            return [str(dataset.get_data_info(index)["img_path"]) for index in range(len(dataset))]
        except (AttributeError, KeyError) as error:
            raise BadInputError(
                f"test_dataloader.dataset ({type(dataset).__name__}) does not tell its images' files by "
                f"get_data_info(index)['img_path'], as data sets of mmengine do; without them nobody knows whether "
                f"images of the calibration are evaluated. Use --no-eval to quantize without measuring AP"
            ) from error

    def _describe_run(self) -> dict[str, Any]:
        """What was asked for."""
        return {
            "quant": self.runner.cfg.model.quant.to_dict(),
            "checkpoint_sha256": sha256_of([self.checkpoint]),
            "calibration_images": self.images.ids,
            "seed": self.seed,
            "version": apq_mmdet.__version__,
        }

    def _describe_conditions(self) -> dict[str, Any]:
        """What else the bits of the result depend on."""
        return {
            "model": self.runner.cfg.model.to_dict(),
            "pipeline": test_pipeline(self.runner.cfg),
            **calibration_conditions(self.images.paths, self._device),
        }

    @property
    def _device(self) -> str:
        return str(next(self.model.parameters()).device)

    def run(self) -> dict[str, float]:
        """Calibrate, save, evaluate; returns the quantized model's metrics (empty without evaluation)."""
        if self.dry_run:
            if is_main_process():
                print(render_table(self.model.quantization_table), end="\n\n")
                print(render_plan(make_plan(self.model, self.images, self.task, self.model.recipe, self.memory_budget)))
            return {}
        start = time.perf_counter()
        if is_main_process():
            self.runner.logger.info("\n" + render_table(self.model.quantization_table))
        float_metrics = None
        if self.eval_float:
            self.runner.logger.info("evaluating the float model")
            with float_only(self.model):
                float_metrics = super().run()
        report = self._calibrate()
        if is_main_process():
            self._save(report)
        metrics = None
        if self.evaluate:
            self.runner.logger.info(
                "evaluating the quantized model; it simulates integer arithmetic and is slower than float"
            )
            metrics = super().run()
        if is_main_process():
            measured = {"float": float_metrics, "quantized": metrics}
            write_report(self.work_dir, self._report(report, time.perf_counter() - start, measured))
            self.states.finish()
        return metrics or {}

    def _calibrate(self) -> CalibrationReport:
        return calibrate(
            self.model,
            self.images,
            self.model.recipe,
            self.task,
            self.states,
            self.seed,
            capture_dir=self.work_dir / STATES,
            memory_budget=self.memory_budget,
        )

    def _save(self, report: CalibrationReport) -> None:
        meta: dict[str, Any] = {META_KEY: plain(self.run_description)}  # ids of images may be numpy's
        dataset_meta = self.float_meta.get("dataset_meta") or self._dataset_meta()
        if dataset_meta:
            meta["dataset_meta"] = map_values(dataset_meta, plain)  # mmengine draws with tuples, not with lists
        remove_report(self.work_dir)  # of weights that are there no more
        save_quantized(self.model, self.work_dir / CHECKPOINT, meta)
        config = standalone_config(self.runner.cfg, report.left_float)
        write_atomic(self.work_dir / CONFIG, config.pretty_text.encode())
        write_atomic(self.work_dir / RUN_CONFIG, self.runner.cfg.pretty_text.encode())

    def _dataset_meta(self) -> dict[str, Any] | None:
        """Class names and so on, of a float checkpoint that has none of mmdet 3."""
        if "CLASSES" in self.float_meta:  # of mmdet 2
            return {key.lower(): self.float_meta[key] for key in ("CLASSES", "PALETTE") if key in self.float_meta}
        return self.dataloader.dataset.metainfo if self.evaluate or self.eval_float else self.images.metainfo

    def _only_formats(self) -> bool:
        """Whether a metric writes detections down and measures nothing."""
        metrics = self.evaluator.metrics if self.evaluate or self.eval_float else []
        return any(getattr(metric, "format_only", False) for metric in metrics)

    def _report(self, report: CalibrationReport, seconds: float, metrics: dict[str, Any]) -> dict[str, Any]:
        recipe = self.model.recipe
        return {
            **run_report(
                recipe=recipe,
                scope=recipe.policy.scope,
                asked=self.run_description,
                device=self._device,
                calibration=report,
                seconds=seconds,
                metrics=metrics,
                float_bytes=Path(self.checkpoint).stat().st_size,
                checkpoint=self.work_dir / CHECKPOINT,
                table=self.model.quantization_table,
            ),
            "evaluated_calibration_images": self.seen,
            **({"format_only": True} if self._only_formats() else {}),
        }
