"""What is written down of a run: what its blocks depend on, its report, and what stands beside its weights."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import CHECKPOINT, recipe
from mmengine.config import Config
from quick_command import quantize
from small_classifiers import VIT, options
from torch import nn

import apq_mmdet
from apq_mmdet.calibration.reports import CalibrationReport
from apq_mmdet.engine import classification_command, ptq_loop
from apq_mmdet.engine.ptq_loop import PTQLoop
from apq_mmdet.engine.run_record import run_report

NOTHING_DONE = CalibrationReport([], [], 0.0)


def sha256(*paths: Path) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def assert_described(run: dict, checkpoint: Path, folder: Path) -> None:
    """Whatever the bits of a calibration on these images with seed 5 depend on, but for its settings."""
    assert (run["seed"], run["version"], run["torch"]) == (5, apq_mmdet.__version__, torch.__version__)
    assert (run["device"], run["threads"]) == ("cpu", torch.get_num_threads())
    assert run["checkpoint_sha256"] == sha256(checkpoint)
    assert len(run["calibration_images"]) > 1
    assert run["calibration_images_sha256"] == sha256(*(folder / name for name in run["calibration_images"]))


def test_blocks_of_a_detector_belong_to_all_that_they_depend_on(config, data, tmp_path, interrupted_at):
    seen = interrupted_at(ptq_loop, "BlockStatesOnDisk")
    assert quantize(config, tmp_path, "--no-eval", "--seed", 5, "--calib-dir", data / "train") == 1
    assert_described(seen["run"], CHECKPOINT, data / "train")


def test_blocks_of_a_classifier_belong_to_all_that_they_depend_on(folders, classifiers, tmp_path, interrupted_at):
    seen = interrupted_at(classification_command, "BlockStatesOnDisk")
    assert classification_command.main(options(folders, classifiers, tmp_path, "--no-eval", "--seed", 5)) == 1
    assert_described(seen["run"], classifiers[VIT], folders / "train")


def test_a_report_tells_the_sizes_of_both_checkpoints(tmp_path):
    (tmp_path / "quantized.pth").write_bytes(b"four")
    report = run_report(
        recipe=recipe("minmax"),
        scope="backbone",
        asked={},
        device="cpu",
        calibration=NOTHING_DONE,
        seconds=0.0,
        metrics={},
        float_bytes=9,
        checkpoint=tmp_path / "quantized.pth",
        table=[],
    )
    assert report["sizes"] == {"float_checkpoint_bytes": 9, "quantized_checkpoint_bytes": 4}


@pytest.fixture
def loop(tmp_path) -> SimpleNamespace:
    """What a PTQLoop saves from."""
    return SimpleNamespace(
        model=None,
        run_description={"seed": 5},
        float_meta={"dataset_meta": {"classes": ("cat", "dog")}},
        _dataset_meta=lambda: {"classes": ("cat", "dog", "of the config alone")},
        work_dir=tmp_path,
        runner=SimpleNamespace(cfg=Config(dict(model=dict(type="MaskRCNN")))),
    )


def test_a_checkpoint_says_which_run_made_it_and_keeps_the_classes_of_the_float_one(loop, monkeypatch):
    saved = []
    monkeypatch.setattr(ptq_loop, "save_quantized", lambda model, path, meta: saved.append((path.name, meta)))
    PTQLoop._save(loop, NOTHING_DONE)
    assert saved == [("quantized.pth", {"apq_mmdet": {"seed": 5}, "dataset_meta": {"classes": ("cat", "dog")}})]


def test_colours_of_classes_come_back_as_mmengine_draws_them(loop, tmp_path):
    palette = [(220, 20, 60), (119, 11, 32)]
    loop.model = nn.Linear(1, 1)
    loop.float_meta["dataset_meta"] = {"classes": ("cat", "dog"), "palette": palette, "sizes": np.array([1, 2])}
    PTQLoop._save(loop, NOTHING_DONE)
    meta = torch.load(tmp_path / "quantized.pth", weights_only=True)["meta"]["dataset_meta"]
    assert meta == {"classes": ("cat", "dog"), "palette": palette, "sizes": [1, 2]}


def test_weights_config_and_run_config_lie_together_and_no_report_of_others(loop, tmp_path):
    loop.model = nn.Linear(1, 1)
    (tmp_path / "report.json").write_text("{}")
    PTQLoop._save(loop, NOTHING_DONE)
    assert {path.name for path in tmp_path.iterdir()} == {"quantized.pth", "config.py", "run_config.py"}
    assert Config.fromfile(tmp_path / "run_config.py").model == loop.runner.cfg.model


@pytest.mark.parametrize("module", [ptq_loop, classification_command])
def test_a_report_goes_before_the_weights_that_it_tells_of(loop, tmp_path, monkeypatch, module):
    def fail(*_):
        assert not (tmp_path / "report.json").exists()
        raise KeyboardInterrupt

    (tmp_path / "report.json").write_text("{}")
    monkeypatch.setattr(module, "save_quantized", fail)
    loop.description, loop.evaluated = {}, None
    kind = PTQLoop if module is ptq_loop else classification_command.ClassificationRun
    with pytest.raises(KeyboardInterrupt):
        kind._save(loop, NOTHING_DONE)


@pytest.mark.parametrize("evaluated", [True, False])
def test_a_run_that_only_writes_detections_down_says_so(evaluated):
    metrics = [SimpleNamespace(), SimpleNamespace(format_only=True)]
    loop = SimpleNamespace(evaluate=evaluated, eval_float=False, evaluator=SimpleNamespace(metrics=metrics))
    assert PTQLoop._only_formats(loop) is evaluated


def test_a_config_that_cannot_be_written_leaves_the_earlier_one(loop, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    (tmp_path / "config.py").write_text("earlier = True")
    monkeypatch.setattr(ptq_loop, "save_quantized", lambda *_: None)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        PTQLoop._save(loop, NOTHING_DONE)
    assert (tmp_path / "config.py").read_text() == "earlier = True"
