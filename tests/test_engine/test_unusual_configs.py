"""Configs and data sets that look otherwise than mmdet's: other scopes, types of values, and what they lack."""

import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from helpers import ROOT
from mmdet.models.detectors import RetinaNet
from mmdet.registry import DATASETS
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from quick_command import quantize

from apq_mmdet.datasets import calibration
from apq_mmdet.engine.quantized_config import quantized_config, standalone_config
from apq_mmdet.models.detectors import QuantizedDetector
from apq_mmdet.registry import MODELS


def test_a_detector_of_the_configs_own_scope_is_found(tmp_path, monkeypatch):
    """Packages beside mmdet keep their models in a registry of their own."""
    folder = tmp_path / "package_beside"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "registry.py").write_text(
        "from mmengine.registry import MODELS as ROOT, Registry\n"
        "MODELS = Registry('model', parent=ROOT, scope='package_beside', locations=['package_beside.detectors'])\n"
    )
    (folder / "detectors.py").write_text(
        "from mmdet.models.detectors import RetinaNet\n"
        "from package_beside.registry import MODELS\n"
        "@MODELS.register_module()\n"
        "class Beside(RetinaNet):\n"
        "    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = quantized_config(Config(dict(default_scope="package_beside", model=dict(type="Beside"))), "minmax", {})
    assert made.model.type == "apq_mmdet.package_beside.detectors.Beside"
    assert issubclass(MODELS.get(made.model.type), QuantizedDetector)


def test_a_users_quantized_detector_among_mmdets_hinders_no_other_one(monkeypatch):
    class Own(QuantizedDetector, RetinaNet):
        pass

    monkeypatch.setitem(MMDET_MODELS.module_dict, "Own", Own)
    assert issubclass(MODELS.get("apq_mmdet.RetinaNet"), RetinaNet)
    assert MODELS.get("apq_mmdet.Own") is Own


def test_this_package_is_imported_before_what_the_config_imports():
    """Which may need what it sets up."""
    cfg = Config(dict(custom_imports=dict(imports=["mine"]), model=dict(type="RetinaNet")))
    made = standalone_config(quantized_config(cfg, "minmax", {}), [])
    assert made.custom_imports.imports == ["apq_mmdet", "mine"]


def test_keys_that_no_file_can_hold_are_refused(config, tmp_path, capsys):
    options = ["--no-eval", "--cfg-options", "model.quant.overrides.global.bits=8"]
    assert quantize(config, tmp_path / "w", *options) == 2
    assert "config key model.quant.overrides.global.bits: 'global' is a word of Python's own" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_ids_and_paths_of_any_kind_are_saved_as_text_and_numbers(config, tmp_path, monkeypatch):
    """Tables give numpy's numbers, and checkpoints that hold them are loaded by nobody."""
    choose = calibration.choose
    monkeypatch.setattr(calibration, "choose", lambda *args: [(np.int64(id), Path(path)) for id, path in choose(*args)])
    assert quantize(config, tmp_path / "w", "--no-eval") == 0
    meta = torch.load(tmp_path / "w" / "quantized.pth", weights_only=True)["meta"]["apq_mmdet"]
    assert [type(id) for id in meta["calibration_images"]] == [int, int]


class WithoutInfo(torch.utils.data.Dataset):
    """One of torch's, which tells nothing of its files."""

    metainfo: ClassVar = {}

    def __init__(self, **_):
        pass

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise AssertionError("nothing is evaluated")


def test_evaluated_images_that_nobody_can_tell_are_refused(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(DATASETS.module_dict, "WithoutInfo", WithoutInfo)
    changed = tmp_path / "changed.py"
    changed.write_text(f"_base_ = '{config}'\ntest_dataloader = dict(dataset=dict(type='WithoutInfo'))\n")
    assert quantize(changed, tmp_path / "w") == 2
    assert "test_dataloader.dataset (WithoutInfo) does not tell its images' files by" in capsys.readouterr().err


def test_without_an_evaluator_nothing_is_measured(config, tmp_path, capsys):
    without = tmp_path / "without.py"
    without.write_text(f"_base_ = '{config}'\ntest_evaluator = None\n")
    assert quantize(without, tmp_path / "w") == 2
    assert "the config has no test_evaluator; use --no-eval" in capsys.readouterr().err
    assert quantize(without, tmp_path / "w", "--no-eval") == 0


def test_recipes_come_along_where_the_package_is_built(tmp_path):
    """An installation without a checkout knows them by their names."""
    built = tmp_path / "built"
    line = [
        sys.executable,
        "setup.py",
        "-q",
        "build",
        "--build-base",
        str(tmp_path / "base"),
        "--build-lib",
        str(built),
    ]
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    names = {path.stem for path in (ROOT / "configs" / "_base_" / "recipes").glob("*.py")}
    assert {path.stem for path in (built / "apq_mmdet" / "recipes").glob("*.py")} == names
    code = "from apq_mmdet.engine import quantized_config as q; print(q.RECIPES, q.load_recipe('erq')['recipe'])"
    run = subprocess.run([sys.executable, "-c", code], cwd=built, check=True, capture_output=True, text=True)
    assert run.stdout.split() == [str(built / "apq_mmdet" / "recipes"), "erq"]
