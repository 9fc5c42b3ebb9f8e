"""Whether images are there, whole, and as large as their annotations say."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from apq_mmdet.errors import BadInputError, listed

ORIENTATION, LYING = 0x0112, (5, 6, 7, 8)  # the EXIF tag, and its values of an image that lies on its side


def check_images(folder: Path, files: Sequence[tuple[str, int, int]], what: str) -> None:
    """Decode every image.

    Pillow and not OpenCV, which decodes what there is of a truncated image and paints the rest grey.

    Args:
        folder: of the images.
        files: name, width and height in pixels of each.
        what: they are for, in the progress bar.

    Raises:
        BadInputError: with the path and fault of the first images that cannot be used.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda file: _fault(folder / file[0], file[1:]), files)
        bar = tqdm(found, total=len(files), desc=f"checking {what}", unit="image")
        faults = [fault for fault in bar if fault]
    if faults:
        raise BadInputError(f"{what} cannot be used: {listed(faults, separator='; ')}")


def _fault(path: Path, size: tuple[int, int]) -> str | None:
    """What is wrong with an image, or None."""
    if not path.is_file():
        return f"{path} does not exist"
    try:
        with Image.open(path) as image:
            image.load()
            found = image.size
            if found == size or (found == size[::-1] and image.getexif().get(ORIENTATION) in LYING):
                return None
    except Exception as error:  # a damaged file makes decoders raise anything
        return f"{path}: {type(error).__name__}: {error}"
    return f"{path} has {found[0]}x{found[1]} pixels, its annotation says {size[0]}x{size[1]}"
