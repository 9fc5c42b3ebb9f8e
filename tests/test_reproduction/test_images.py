import contextlib
import shutil

import pytest
from PIL import Image

from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction.images import check_images


@pytest.fixture
def files(tmp_path):
    for number in range(5):
        Image.effect_noise((40, 30), 50).save(tmp_path / f"{number}.jpg")
    return [(f"{number}.jpg", 40, 30) for number in range(5)]


def test_whole_images(tmp_path, files):
    check_images(tmp_path, files, "images")


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def remove(path):
    path.unlink()


def shrink(path):
    Image.effect_noise((20, 30), 50).save(path)


def replace_by_text(path):
    path.write_text("<html>404</html>")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"images cannot be used: .*3.jpg: OSError: image file is truncated"),
        (remove, r"3.jpg does not exist"),
        (shrink, r"3.jpg has 20x30 pixels, its annotation says 40x30"),
        (replace_by_text, r"3.jpg: UnidentifiedImageError"),
    ],
)
def test_damaged_images_are_named(tmp_path, files, damage, message):
    damage(tmp_path / "3.jpg")
    with pytest.raises(BadInputError, match=message):
        check_images(tmp_path, files, "images")


def test_many_damaged_images_are_counted(tmp_path, files):
    shutil.rmtree(tmp_path)
    with pytest.raises(BadInputError, match=r"0.jpg.*1.jpg.*2.jpg.*\(and 2 more\)"):
        check_images(tmp_path, files, "images")


@pytest.mark.parametrize(("orientation", "fits"), [(1, False), (3, False), (6, True)])
def test_an_image_on_its_side_may_be_as_large_as_it_is_shown(tmp_path, orientation, fits):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((40, 30), 50).save(tmp_path / "0.jpg", exif=exif)
    check_images(tmp_path, [("0.jpg", 40, 30)], "images")
    expected = contextlib.nullcontext() if fits else pytest.raises(BadInputError, match="has 40x30 pixels")
    with expected:
        check_images(tmp_path, [("0.jpg", 30, 40)], "images")
