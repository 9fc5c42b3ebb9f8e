import copy
import os
import random

import pytest
from helpers import ROOT
from mmengine.config import Config
from mmengine.registry import DefaultScope

from apq_mmdet.datasets import write_demo_set
from apq_mmdet.datasets.calibration import (
    CalibrationImages,
    calibration_from_config,
    calibration_from_folder,
    choose,
    training_images,
)
from apq_mmdet.errors import BadInputError


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "data"
    write_demo_set(folder, 0, 4, 3)
    cfg = Config.fromfile(ROOT / "configs/demo/mask-rcnn_swin-demo.py")
    cfg.train_dataloader.dataset.data_root = cfg.test_dataloader.dataset.data_root = f"{folder}/"
    return cfg


def wrapped(cfg):
    """A config whose training set joins a repeated set with one that holds other images."""
    cfg = copy.deepcopy(cfg)
    first = cfg.train_dataloader.dataset
    second = {**first, "ann_file": "annotations/instances_val.json", "data_prefix": dict(img="val/")}
    again = {**first, "data_root": f"{first.data_root}../data/"}
    parts = [dict(type="RepeatDataset", times=2, dataset=first), second, again]
    cfg.train_dataloader.dataset = dict(type="ConcatDataset", datasets=parts)
    return cfg


def test_images_of_all_joined_sets_count_once(cfg):
    """Ids of two sets can be the same."""
    images, metainfo = training_images(wrapped(cfg))
    assert len(images) == len({os.path.realpath(path) for _, path in images}) == 4 + 3
    assert metainfo["classes"] == tuple(cfg.metainfo.classes)
    assert len(calibration_from_config(wrapped(cfg), 7, 0)) == 7
    with pytest.raises(BadInputError, match="8 calibration images asked for, the training set holds 7"):
        calibration_from_config(wrapped(cfg), 8, 0)


@pytest.mark.parametrize(
    ("images", "ordered"),
    [
        ([(10, "b"), (2, "a"), (1, "c")], [(1, "c"), (2, "a"), (10, "b")]),
        ([(1, "b"), ("x", "c"), (1, "a")], [(1, "a"), (1, "b"), ("x", "c")]),
    ],
)
def test_images_are_drawn_in_the_order_of_their_ids(images, ordered):
    assert choose(images, 3, 5, "") == random.Random(5).sample(ordered, 3)


@pytest.mark.parametrize("scope", ["mmdet", None])
def test_transforms_are_mmdets_whatever_was_built_before(cfg, scope):
    cfg = copy.deepcopy(cfg)
    cfg.default_scope = scope
    folder = f"{cfg.train_dataloader.dataset.data_root}/train"
    with DefaultScope.overwrite_default_scope("mmengine"):
        assert calibration_from_folder(cfg, folder, 1, 0)[0]["inputs"].shape[0] == 3
        assert len(calibration_from_config(cfg, 2, 0)) == 2


def test_images_are_told_by_their_suffix_in_any_case(cfg, tmp_path):
    for name in ("a.png", "B.JPG", "c.Jpeg", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert sorted(calibration_from_folder(cfg, str(tmp_path), 3, 0).ids) == ["B.JPG", "a.png", "c.Jpeg"]


def test_an_image_counts_once_whatever_links_lead_to_it(cfg, tmp_path):
    (tmp_path / "b.png").touch()
    for name in ("a.png", "c.png"):
        (tmp_path / name).symlink_to("b.png")
    assert calibration_from_folder(cfg, str(tmp_path), 1, 0).ids == ["a.png"]
    with pytest.raises(BadInputError, match=r"2 calibration images asked for, folder .* holds 1"):
        calibration_from_folder(cfg, str(tmp_path), 2, 0)


def test_an_image_of_which_the_pipeline_makes_nothing_is_named(tmp_path):
    (tmp_path / "empty.png").write_bytes(b"")
    images = CalibrationImages([(0, str(tmp_path / "empty.png"))], [dict(type="LoadImageFromFile", ignore_empty=True)])
    with pytest.raises(BadInputError, match=r"empty\.png: the test pipeline makes nothing of it"):
        images.check()


def test_images_behind_a_file_backend_are_told_to_be_local():
    with pytest.raises(BadInputError, match=r"s3://bucket/1\.png does not exist; images behind a file backend"):
        CalibrationImages([(0, "s3://bucket/1.png")], []).check()
