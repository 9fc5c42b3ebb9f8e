"""Images for classifiers: a tree with one folder a class, and a folder of calibration images."""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from apq_mmdet.datasets.calibration import SUFFIXES, CalibrationImages, choose, distinct
from apq_mmdet.errors import BadInputError

Transform = Callable[[Image.Image], Tensor]  # an RGB image to [3, H, W]


def image_files(folder: str | Path) -> list[str]:
    """Paths of all images in a folder and its subfolders, in the order of torchvision's ImageFolder.

    A folder to which several links lead counts once.
    """
    return [
        os.path.join(root, name)
        for root, names in sorted(_walk(folder))
        for name in sorted(names)
        if name.lower().endswith(SUFFIXES)
    ]


def _walk(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder once, also where links lead to it or back to one that it is in, and the names of its files."""
    seen = {os.path.realpath(folder)}
    for root, below, names in os.walk(folder, followlinks=True):
        yield root, names
        new = {}
        for name in sorted(below):
            new.setdefault(os.path.realpath(os.path.join(root, name)), name)
        below[:] = [name for path, name in new.items() if path not in seen]  # tells os.walk where to go on
        seen |= new.keys()


def read_image(path: str) -> Image.Image:
    """The decoded RGB image."""
    with Image.open(path) as image:
        return image.convert("RGB")


def read_class_list(path: str | Path) -> list[str]:
    """Folder names by class index, one a line.

    Raises:
        BadInputError: no such file, an empty one, or a name that is there twice.
    """
    try:
        names = [line.strip() for line in Path(path).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise BadInputError(f"class list {path} cannot be read: {error}") from error
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise BadInputError(f"class list {path} holds {twice!r} twice; it takes one folder name a line")
    if not names:
        raise BadInputError(f"class list {path} is empty")
    return names


class ImageFolder(Dataset):
    """Labelled images ``root/class/**/*.jpg``; an item is ([3, H, W], class index).

    Args:
        root: holds one folder a class.
        transform: of the decoded images.
        classes: folder names by class index, of which some may be absent; None for all folders in sorted order, as
            torchvision's ImageFolder numbers them.

    Attributes:
        classes: folder names by class index.
        samples: (path, class index) of each image.

    Raises:
        BadInputError: no such folder, no class folders, one that the list does not name, one without images, or a
            file that is no image.
    """

    def __init__(self, root: str | Path, transform: Transform, classes: Sequence[str] | None = None) -> None:
        if not os.path.isdir(root):
            raise BadInputError(f"image folder {root} does not exist")
        folders = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
        if not folders:
            raise BadInputError(f"image folder {root} holds no class folders; it takes {root}/CLASS/IMAGE.jpg")
        self.classes = folders if classes is None else list(classes)
        unknown = [name for name in folders if name not in self.classes]
        if unknown:
            raise BadInputError(f"image folder {root}: {unknown[0]!r} is not in the class list ({len(unknown)} such)")
        self.transform = transform
        self.samples: list[tuple[str, int]] = []
        for name in folders:
            paths = image_files(Path(root) / name)
            if not paths:
                raise BadInputError(f"class folder {Path(root) / name} holds no images ({', '.join(SUFFIXES)})")
            self.samples += [(path, self.classes.index(name)) for path in paths]
        self._check()

    def _check(self) -> None:
        """Read the headers: nearly all of what can be wrong with a file, at a hundredth of the cost of decoding it."""
        for path, _ in self.samples:
            try:
                with Image.open(path):
                    pass
            except Exception as error:  # whatever Pillow makes of it, such as its refusal of huge ones
                raise BadInputError(f"evaluation image {path} cannot be read: {error}") from error

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The transformed image [3, H, W] and its label."""
        path, label = self.samples[index]
        try:
            return self.transform(read_image(path)), label
        except Exception as error:
            raise RuntimeError(f"evaluation image {path} cannot be decoded: {error}") from error


class FolderImages(CalibrationImages):
    """Calibration images of a classifier; an item is a transformed image [1, 3, H, W].

    Args:
        folder: of images, also in subfolders, such as those of classes; no labels are read.
        num: images to take.
        seed: chooses them.
        transform: of the decoded images.

    Raises:
        BadInputError: no such folder, or too few images.
    """

    def __init__(self, folder: str | Path, num: int, seed: int, transform: Transform) -> None:
        if not os.path.isdir(folder):
            raise BadInputError(f"calibration folder {folder} does not exist")
        images = [(os.path.relpath(path, folder), path) for path in distinct(image_files(folder))]
        super().__init__(choose(images, num, seed, f"folder {folder}"), pipeline=())
        self._transform = transform

    def __getitem__(self, index: int) -> Tensor:
        """The transformed image [1, 3, H, W]."""
        return self._transform(read_image(self.paths[index])).unsqueeze(0)
