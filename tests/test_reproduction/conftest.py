"""A drawn data set in COCO's layout, and the demo detector under an index of its own."""

import os
import shutil
import signal
from pathlib import Path

import pytest
from helpers import CHECKPOINT, ROOT
from mmengine.config import Config
from reproduction_trial import FILE, write_index

from apq_mmdet.datasets import write_demo_set
from apq_mmdet.reproduction.rows import Selection, select
from apq_mmdet.reproduction.settings import Settings


@pytest.fixture(autouse=True)
def _signals():
    """As in a terminal, also where the tests run in the background; what the command installs is taken back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    """8 training and 4 val images, under COCO's names."""
    folder = tmp_path_factory.mktemp("drawn") / "coco"
    write_demo_set(folder, 0, 8, 4)
    for split in ("train", "val"):
        (folder / split).rename(folder / f"{split}2017")
        annotations = folder / "annotations"
        (annotations / f"instances_{split}.json").rename(annotations / f"instances_{split}2017.json")
    return folder


@pytest.fixture
def data_root(drawn, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(drawn, tmp_path / "coco")


@pytest.fixture
def checkpoints(tmp_path) -> Path:
    """A folder with the demo detector's checkpoint under a name with its digest."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    os.symlink(CHECKPOINT, folder / FILE)
    return folder


@pytest.fixture(scope="session")
def detector(tmp_path_factory) -> Path:
    """The demo detector's config in one file, which is read faster."""
    cfg = Config.fromfile(ROOT / "configs" / "demo" / "mask-rcnn_swin-demo.py")
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False)
    path = tmp_path_factory.mktemp("config") / "float.py"
    cfg.dump(path)
    return path


@pytest.fixture
def index(detector, tmp_path) -> Path:
    return write_index(tmp_path, detector)


@pytest.fixture
def selection(index) -> Selection:
    """The float detector and its 8-bit and 4-bit rows, of two images each."""
    return select(index, num_calib=[2])


@pytest.fixture
def settings(data_root, checkpoints, tmp_path) -> Settings:
    return Settings(data_root, checkpoints, tmp_path / "work", not_coco=True, device="cpu")
