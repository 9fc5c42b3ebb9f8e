from dataclasses import replace

import pytest

from apq_mmdet.reproduction.published import METHODS, other_methods, published, reference
from apq_mmdet.reproduction.rows import AP, INDEX, select

FOUND = select(INDEX)


def row(model):
    return next(row for row in FOUND.rows if row.model == model)


def test_the_published_row_of_a_method():
    found = published(row("mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco_apq-w4a4"))
    assert found.ap == AP(23.7, 22.6)  # APQ-ViT in Table 2 of I&S-ViT
    assert "APQ-ViT, I&S-ViT, Table 2" in found.source
    assert "float weights of 46.0 / 41.6" in found.source


@pytest.mark.parametrize(
    "model",
    [
        "mask-rcnn_swin-t-p4-w7_fpn_1x_coco_apq-w4a4",  # published numbers are of 36 epochs
        "mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco_apq-plus-w4a4",  # of this project alone
        "mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco_apq-w8a8",  # not among the numbers
    ],
)
def test_rows_that_nobody_published(model):
    assert published(row(model)) is None


def test_methods_are_among_the_published_ones():
    methods = {line[2] for line in other_methods("mask-rcnn_swin-t-p4-w7_fpn_amp-ms-crop-3x_coco", "W4A4")}
    assert set(METHODS.values()) <= methods


def test_the_metafile_comes_before_the_papers():
    detector = next(d for d in FOUND.detectors if d.name.startswith("mask-rcnn_swin-s"))
    assert reference(detector).ap == AP(48.2, 43.2)
    assert reference(replace(detector, reference=None)).ap == AP(48.5, 43.3)
    assert reference(replace(detector, reference=None, name="other")) is None
