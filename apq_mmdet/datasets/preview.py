"""A contact sheet of the demo set, with the annotations drawn in."""

from pathlib import Path

import cv2
import numpy as np

from apq_mmdet.datasets.demo import demo_image
from apq_mmdet.datasets.scene import LONG_SIDE, Image, Instance
from apq_mmdet.datasets.shapes import CLASSES
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import check_target

PALETTE = (
    (0, 0, 255),
    (255, 128, 0),
    (0, 255, 255),
    (0, 128, 255),
    (0, 255, 0),
    (255, 0, 128),
    (255, 255, 0),
    (255, 0, 255),
)


def draw_instances(image: Image, instances: list[Instance]) -> Image:
    """Outline, box and class name of every instance, on a copy of the BGR image (H, W, 3)."""
    picture = image.copy()
    for instance in instances:
        colour = PALETTE[instance.label]
        contours = cv2.findContours(instance.mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)[0]
        cv2.drawContours(picture, contours, -1, colour, 1)
        x, y, width, height = cv2.boundingRect(instance.mask.astype(np.uint8))
        cv2.rectangle(picture, (x, y), (x + width - 1, y + height - 1), colour, 1)
        cv2.putText(
            picture,
            CLASSES[instance.label],
            (x + 2, y + 10),
            cv2.FONT_HERSHEY_SIMPLEX,
            0.35,
            (255, 255, 255),
            1,
        )
    return picture


def contact_sheet(out: Path, seed: int) -> None:
    """Write the first five val images of a seed as one picture, side by side.

    Raises:
        BadInputError: ``out`` cannot be written, or its name ends in no format of pictures.
    """
    check_target(out)
    if not cv2.haveImageWriter(str(out)):
        raise BadInputError(f"{out} must end in a format of pictures, such as .png")
    sheet = np.zeros((LONG_SIDE, 5 * LONG_SIDE, 3), np.uint8)
    for index in range(5):
        picture = draw_instances(*demo_image(seed, "val", index))
        x = index * LONG_SIDE
        sheet[: picture.shape[0], x : x + picture.shape[1]] = picture
    out.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(out), sheet):
        raise OSError(f"could not write {out}")
