import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apq_mmdet.datasets.image_folder import FolderImages, ImageFolder, image_files, read_class_list, read_image
from apq_mmdet.engine.classification import make_transform
from apq_mmdet.errors import BadInputError


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)


def test_folders_are_read_as_torchvision_reads_them(tmp_path):
    from torchvision.datasets import ImageFolder as Torchvisions

    root = tmp_path / "root"
    touch(*(root / name for name in ("b10/1.png", "b10/z/2.JPEG", "b10/a/3.jpg", "b9/10.png", "b9/9.png", "B/x.bmp")))
    (root / "b9" / "notes.txt").write_text("no image")
    (root / "linked").symlink_to(root / "b9")
    own, other = ImageFolder(root, lambda image: image), Torchvisions(str(root))
    assert own.classes == other.classes == ["B", "b10", "b9", "linked"]
    assert own.samples == other.samples
    assert own[0][0].size == (6, 4)


def test_links_lead_to_each_folder_once_and_calibration_takes_each_image_once(tmp_path):
    root = tmp_path / "root"
    touch(root / "a" / "1.png", root / "a" / "b" / "2.png", tmp_path / "elsewhere" / "3.png")
    (root / "a" / "back").symlink_to("..")
    (root / "a" / "b" / "again.png").symlink_to("2.png")
    (root / "a" / "other.png").symlink_to(tmp_path / "elsewhere" / "3.png")
    for name in ("c", "d"):
        (root / name).symlink_to(tmp_path / "elsewhere")
    found = [os.path.relpath(path, root) for path in image_files(root)]
    assert found == ["a/1.png", "a/other.png", "a/b/2.png", "a/b/again.png", "c/3.png"]
    drawn = FolderImages(root, 3, 0, lambda image: image)
    assert sorted(drawn.ids) == ["a/1.png", "a/b/2.png", "a/other.png"]
    with pytest.raises(BadInputError, match=r"4.*3|3.*4"):
        FolderImages(root, 4, 0, lambda image: image)


def test_images_without_colour_are_read_as_red_green_and_blue(tmp_path):
    Image.fromarray(np.uint8([[0, 70, 255]])).save(tmp_path / "grey.png")
    assert np.asarray(read_image(tmp_path / "grey.png")).tolist() == [[[0] * 3, [70] * 3, [255] * 3]]


def test_a_class_list_gives_the_order(tmp_path):
    touch(tmp_path / "root" / "a" / "1.png", tmp_path / "root" / "c" / "1.png")
    (tmp_path / "classes.txt").write_text("c\n\nb\na\n", "utf-8-sig")  # as editors on Windows save it
    classes = read_class_list(tmp_path / "classes.txt")
    images = ImageFolder(tmp_path / "root", lambda image: image, classes)
    assert images.classes == ["c", "b", "a"]
    assert [label for _, label in images.samples] == [2, 0]


def test_calibration_images_are_drawn_from_subfolders_too(tmp_path):
    touch(*(tmp_path / name / f"{index}.png" for name in "abcd" for index in range(10)))
    transform = make_transform({"input_size": (3, 32, 32), "crop_pct": 1.0})
    images = FolderImages(tmp_path, 5, 0, transform)
    assert images[0].shape == (1, 3, 32, 32)
    assert len({Path(name).parent.name for name in images.ids}) > 1
    assert images.ids == FolderImages(tmp_path, 5, 0, transform).ids
    assert images.ids != FolderImages(tmp_path, 5, 1, transform).ids


def test_an_image_that_breaks_off_names_itself(tmp_path):
    path = tmp_path / "root" / "a" / "1.jpg"
    touch(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    images = ImageFolder(tmp_path / "root", lambda image: image)
    with pytest.raises(RuntimeError, match=r"1\.jpg cannot be decoded"):
        images[0]


def test_an_evaluation_image_that_is_too_large_is_bad_input(tmp_path, monkeypatch):
    touch(tmp_path / "root" / "a" / "1.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    with pytest.raises(BadInputError, match=r"1.png cannot be read: .*exceeds limit"):
        ImageFolder(tmp_path / "root", lambda image: image)
