from typing import Any

import pytest
from helpers import build_swin, recipe

from apq_mmdet.layers import LayerRow, quantize_model
from apq_mmdet.report import render_table, summary_line


def test_table_names_every_row_and_counts():
    swin = build_swin()
    rows = quantize_model(swin, recipe("apq", overrides=dict(mine=dict(pattern="*.proj", float=True))).policy)
    text = render_table(rows)
    lines = text.splitlines()
    assert len(lines) == len(rows) + 3  # header, rule, totals
    assert "left float by overrides.mine" in text
    linear = sum(row.elements for row in rows if row.bits and row.role == "weight")
    total = sum({row.layer: row.elements for row in rows}.values())
    assert lines[-1].startswith("11 layers quantized")
    assert f"{linear / total:.1%} of {total:,} weights" in lines[-1]


def test_a_table_by_hand():
    rows = [
        LayerRow("fc", "Linear", "weight", 4, "affine, asymmetric", "channel", 8, 30, ""),
        LayerRow("fc", "Linear", "input", 6, "affine, asymmetric", "tensor", 1, 30, ""),
        LayerRow("norm", "LayerNorm", "-", None, "float32", "-", 0, 10, "LayerNorm has no quantized form"),
    ]
    _, _, *lines, totals = render_table(rows).splitlines()
    assert [line.split() for line in lines] == [
        ["fc", "Linear", "weight", "4", "affine,", "asymmetric", "channel", "(8)"],
        ["fc", "Linear", "input", "6", "affine,", "asymmetric", "tensor"],
        ["norm", "LayerNorm", "-", "32", "float32", "-", "LayerNorm", "has", "no", "quantized", "form"],
    ]
    assert totals == "1 layers quantized, 1 float; 75.0% of 40 weights in integers"


@pytest.fixture
def report() -> dict[str, Any]:
    return dict(
        bits=dict(weight=4, activation=6),
        recipe="apq",
        scope="backbone",
        metrics=dict(float={"coco/bbox_mAP": 0.5, "coco/segm_mAP": 0.4}, quantized={"coco/bbox_mAP": 0.49}),
        sizes=dict(float_checkpoint_bytes=2**21, quantized_checkpoint_bytes=2**20),
        calibration_seconds=61.2,
        seconds=90,
    )


def test_summary_is_one_line_with_ap_sizes_and_time(report):
    assert summary_line(report) == (
        "W4A6 apq (backbone): float bbox AP 50.0, segm AP 40.0 | quantized bbox AP 49.0 | 2.0 -> 1.0 MiB | "
        "calibration 61 s, total 90 s"
    )
    report["metrics"] = dict(float=None, quantized={"pascal_voc/mAP": 0.25})
    assert "float not measured | quantized pascal_voc/mAP 0.25" in summary_line(report)


def test_detections_that_were_only_written_down_are_told_from_none(report):
    report["metrics"] = dict(float=None, quantized={})
    assert "float not measured | quantized no metrics (nothing detected?) |" in summary_line(report)
    report["format_only"] = True
    assert "float not measured | quantized no metrics (format_only) |" in summary_line(report)
