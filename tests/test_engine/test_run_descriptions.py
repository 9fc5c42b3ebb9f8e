"""What is written down of a run: what its blocks depend on, its report, and what stands beside its weights."""

import hashlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import CHECKPOINT, recipe
from mmengine.config import Config
from quick_command import quantize
from small_classifiers import VIT, options

import apq_mmdet
from apq_mmdet.calibration.calibrator import CalibrationReport
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
    assert saved == [("quantized.pth", {"apq_mmdet": {"seed": 5}, "dataset_meta": {"classes": ["cat", "dog"]}})]


def test_a_config_that_cannot_be_written_leaves_the_earlier_one(loop, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    (tmp_path / "config.py").write_text("earlier = True")
    monkeypatch.setattr(ptq_loop, "save_quantized", lambda *_: None)
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        PTQLoop._save(loop, NOTHING_DONE)
    assert (tmp_path / "config.py").read_text() == "earlier = True"
