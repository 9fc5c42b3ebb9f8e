"""The drawn demo set: determinism, COCO validity, sizes and classes."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from pycocotools.coco import COCO

from apq_mmdet.datasets import CLASSES, demo_image, write_demo_set
from apq_mmdet.datasets.scene import LONG_SIDE, MIN_AREA, SHORT_SIDE
from apq_mmdet.errors import BadInputError

NUM_TRAIN, NUM_VAL = 4, 40


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "demo"
    assert write_demo_set(out, seed=3, num_train=NUM_TRAIN, num_val=NUM_VAL)
    return out


@pytest.fixture(scope="module")
def val(demo_set: Path) -> COCO:
    return COCO(str(demo_set / "annotations/instances_val.json"))


def test_image_depends_on_seed_split_and_index_only() -> None:
    first, again = demo_image(0, "val", 5), demo_image(0, "val", 5)
    np.testing.assert_array_equal(first[0], again[0])
    for other in (demo_image(1, "val", 5), demo_image(0, "train", 5), demo_image(0, "val", 6)):
        assert first[0].shape != other[0].shape or (first[0] != other[0]).any()


def test_files_do_not_depend_on_the_number_of_workers(demo_set: Path, tmp_path: Path) -> None:
    write_demo_set(tmp_path / "demo", seed=3, num_train=NUM_TRAIN, num_val=NUM_VAL, workers=2)
    assert contents(tmp_path / "demo") == contents(demo_set)


def test_complete_set_is_left_alone_and_another_is_replaced(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert write_demo_set(out, seed=0, num_train=1, num_val=1)
    before = (out / "train/000000.jpg").stat().st_mtime_ns
    assert not write_demo_set(out, seed=0, num_train=1, num_val=1)
    assert (out / "train/000000.jpg").stat().st_mtime_ns == before
    assert write_demo_set(out, seed=0, num_train=2, num_val=1)
    assert len(list((out / "train").iterdir())) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["demo"]


@pytest.mark.parametrize("name", ["before", "set"])
def test_a_set_of_any_name_is_replaced(tmp_path: Path, name: str) -> None:
    for seed in (0, 1):
        assert write_demo_set(tmp_path / name, seed, 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_foreign_folder_is_not_replaced(tmp_path: Path) -> None:
    """Neither a thesis nor COCO, whose folder looks much like that of a demo set."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_train2017.json").write_text("irreplaceable")
    with pytest.raises(BadInputError, match="something other than a demo set"):
        write_demo_set(tmp_path, seed=0, num_train=1, num_val=1)
    assert (tmp_path / "annotations/instances_train2017.json").exists()


@pytest.mark.parametrize(
    ("stamp", "more"),
    [('{"name": "my app"}', ()), ("no JSON", ()), ('{"format": 1, "seed": 0, "train": 2, "val": 1}', ("thesis.txt",))],
)
def test_a_file_of_the_stamps_name_makes_no_demo_set(tmp_path: Path, stamp: str, more: tuple[str, ...]) -> None:
    (tmp_path / "demo.json").write_text(stamp)
    for name in more:
        (tmp_path / name).write_text("irreplaceable")
    before = contents(tmp_path)
    with pytest.raises(BadInputError, match="something other than a demo set"):
        write_demo_set(tmp_path, seed=0, num_train=1, num_val=1)
    assert contents(tmp_path) == before


def test_links_are_followed_and_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert write_demo_set(tmp_path / "link", seed=0, num_train=1, num_val=1)
    assert (tmp_path / "real" / "demo.json").is_file()
    monkeypatch.chdir(tmp_path / "real")
    assert not write_demo_set(Path("."), seed=0, num_train=1, num_val=1)
    (tmp_path / "new").mkdir()
    monkeypatch.chdir(tmp_path / "new")
    assert write_demo_set(Path("."), seed=0, num_train=1, num_val=1)
    assert (tmp_path / "new" / "demo.json").is_file()


def test_images_have_the_stated_sizes(demo_set: Path, val: COCO) -> None:
    assert len(val.getImgIds()) == NUM_VAL
    for image in val.loadImgs(val.getImgIds()):
        pixels = cv2.imread(str(demo_set / "val" / image["file_name"]))
        assert pixels.shape == (image["height"], image["width"], 3)
        assert max(pixels.shape) == LONG_SIDE
        assert min(pixels.shape[:2]) >= SHORT_SIDE[0]


def test_masks_boxes_and_areas_agree(val: COCO) -> None:
    for entry in val.loadAnns(val.getAnnIds()):
        image = val.imgs[entry["image_id"]]
        mask = val.annToMask(entry)
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == entry["area"] >= MIN_AREA
        assert cv2.boundingRect(mask) == tuple(entry["bbox"])


def test_masks_of_an_image_do_not_overlap(val: COCO) -> None:
    for image in val.getImgIds():
        masks = [val.annToMask(a) for a in val.loadAnns(val.getAnnIds(imgIds=[image]))]
        assert np.sum(masks, axis=0).max() <= 1


def test_all_classes_and_sizes_occur(val: COCO) -> None:
    entries = val.loadAnns(val.getAnnIds())
    assert [c["name"] for c in val.loadCats(val.getCatIds())] == list(CLASSES)
    assert {e["category_id"] for e in entries} == set(val.getCatIds())
    bins = np.bincount(np.digitize([e["area"] for e in entries], [32**2, 96**2]), minlength=3) / len(entries)
    assert (bins > 0.08).all(), bins


def test_config_names_the_same_classes() -> None:
    config = Path(__file__).parents[2] / "configs/demo/_base_demo_dataset.py"
    assert tuple(Config.fromfile(config).metainfo.classes) == tuple(CLASSES)
