"""Drawn data sets of a few images, a config of the demo detector on one, and classifiers trained on the other."""

import argparse
import inspect
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import CHECKPOINT, ROOT
from small_classifiers import MODELS, train, write_class_folders

from apq_mmdet.datasets import write_demo_set

TRAIN, VAL = 9, 4


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_demo_set(folder, 0, TRAIN, VAL)
    return folder


@pytest.fixture(scope="session")
def config(data, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "detector.py"
    path.write_text(
        f"_base_ = '{ROOT}/configs/demo/mask-rcnn_swin-demo.py'\n"
        f"train_dataloader = dict(dataset=dict(data_root='{data}/'))\n"
        f"test_dataloader = dict(dataset=dict(data_root='{data}/'), num_workers=0, persistent_workers=False)\n"
        f"test_evaluator = dict(ann_file='{data}/annotations/instances_val.json')\n"
        "default_hooks = dict(logger=dict(interval=1000))\n"
    )
    return path


@pytest.fixture
def copied_data(data, tmp_path) -> Path:
    """A copy of the data set that a test may damage."""
    return shutil.copytree(data, tmp_path / "copy")


@pytest.fixture(scope="session")
def checkpoint() -> dict:
    return torch.load(CHECKPOINT, weights_only=True)


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> Path:
    """``train`` and ``val``, each with a folder for every class."""
    root = tmp_path_factory.mktemp("class_folders")
    write_class_folders(root)
    return root


@pytest.fixture(scope="session")
def classifiers(folders) -> dict[str, Path]:
    """A trained checkpoint of each small classifier."""
    paths = {}
    for name in MODELS:
        paths[name] = folders / f"{name}.pth"
        torch.save({"state_dict": train(name, folders), "args": argparse.Namespace(lr=1e-3)}, paths[name])
    return paths


@pytest.fixture
def interrupted_at(monkeypatch) -> Callable[[ModuleType, str], dict[str, Any]]:
    """Lets a command be interrupted where it calls ``module.name``; what it calls that with is then in the dict."""

    def at(module: ModuleType, name: str) -> dict[str, Any]:
        signature, seen = inspect.signature(getattr(module, name)), {}

        def interrupt(*args, **kwargs):
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            seen.update(bound.arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(module, name, interrupt)
        return seen

    return at
