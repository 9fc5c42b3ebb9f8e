import errno
import json
import os
from dataclasses import replace

import pytest
from reproduction_trial import NAME, examined_coco

from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction.data import TRAIN, VAL, Data
from apq_mmdet.reproduction.entry import Entry, ap_of, is_reached
from apq_mmdet.reproduction.rows import AP, Selection
from apq_mmdet.reproduction.table import Table


def result(box, mask, **changes):
    metrics = {"coco/bbox_mAP": box / 100, "coco/segm_mAP": mask / 100} if box is not None else {}
    stack = {"versions": {"torch": "2.13.0"}, "device": "cuda:0", "threads": 1}
    return {"metrics": metrics, "seconds": 120.0, **stack, **changes}


def made(item, box, mask, **changes):
    entry = Entry(item)
    entry.finish(result(box, mask, **changes))
    return entry


def table_of(selection, entries, tmp_path, **changes):
    return Table(entries, replace(examined_coco(selection), **changes), tmp_path)


def cells(path, name):
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize(
    ("ours", "reached"),
    [
        ((42.7, 39.3), True),
        ((42.8, 39.2), True),  # exactly 0.1 off: not so in binary
        ((42.6, 39.4), True),
        ((42.9, 39.3), False),
        ((42.7, 39.1), False),
        ((0.0, 0.0), False),
        ((42.7, None), False),
        ((None, None), False),
    ],
)
def test_reached_is_within_a_tenth(ours, reached):
    assert is_reached(AP(*ours), AP(42.7, 39.3)) is reached


def test_a_reference_without_masks():
    assert is_reached(AP(42.7, None), AP(42.7, None))


def test_ap_of_metrics():
    assert ap_of({"coco/bbox_mAP": 0.427, "coco/segm_mAP": 0.393, "coco/bbox_mAP_50": 1.0}) == AP(42.7, 39.3)
    assert ap_of({}) == AP(None, None)


def test_the_table_of_coco(selection, tmp_path):
    detector, eight, four = *selection.detectors, *selection.rows
    entries = [made(detector, 46.0, 41.6), Entry(eight), made(four, 24.0, 22.5, calibration_seconds=60.0)]
    table_of(selection, entries, tmp_path).write()
    text = tmp_path / "table.md"
    assert text.read_text().startswith("# COCO val2017, published and reproduced\n\nData: COCO 2017 (118,287 images")
    assert cells(text, NAME)[1:] == [
        *("-", "W32A32", "-", "-", "-", "46.0 / 41.7", "46.0 / 41.6", "+0.0 / -0.1", "-", "2.0", "1", "done")
    ]
    assert cells(text, eight.model)[6:] == ["-", "-", "-", "-", "-", "-", "waiting"]
    assert cells(text, four.model)[1:] == [
        *("apq", "W4A4", "backbone", "2", "0"),
        *("23.7 / 22.6", "24.0 / 22.5", "+0.3 / -0.1", "1.0", "2.0", "1", "done"),
    ]
    assert "* made with 1: torch 2.13.0; cuda:0, threads: 1" in text.read_text()
    assert f"* weights of {NAME}: " in text.read_text()
    assert "| mask-rcnn_swin-t | W4A4 | I&S-ViT | 37.5 / 36.6 | I&S-ViT, Table 2 |" in text.read_text()
    content = json.loads((tmp_path / "table.json").read_text())
    assert content["data"]["is_coco"] is True
    row = content["rows"][2]
    assert (row["name"], row["seed"], row["ours"]) == (four.name, 0, {"box": 24.0, "mask": 22.5})
    assert row["difference"] == {"box": 0.3, "mask": -0.1}
    assert row["checkpoint"]["sha256"] == "c" * 64
    assert row["calibration_images"] == f"{four.name}/calibration_images.json"


def test_other_data_is_compared_with_nothing(selection, tmp_path):
    data = Data("mini", {TRAIN: 92, VAL: 66}, {})
    detector = selection.detectors[0]
    table_of(selection, [made(detector, 10.0, 10.0)], tmp_path, data=data).write()
    text = (tmp_path / "table.md").read_text()
    assert text.startswith("# NOT COCO")
    assert "NOT COCO 2017: 92 images in train2017, 66 images in val2017, of mini" in text
    assert cells(tmp_path / "table.md", NAME)[6:9] == ["46.0 / 41.7", "10.0 / 10.0", "-"]
    assert not made(detector, 10.0, 10.0).is_off_reference(data)
    assert made(detector, 10.0, 10.0).is_off_reference(examined_coco(selection).data)


def test_a_detector_without_detections(selection, tmp_path):
    entry = made(selection.detectors[0], None, None)
    table_of(selection, [entry], tmp_path).write()
    assert cells(tmp_path / "table.md", NAME)[7:9] == ["- / -", "- / -"]
    assert cells(tmp_path / "table.md", NAME)[-1] == "done, no detections"
    assert entry.is_off_reference(examined_coco(selection).data)


def test_stacks_are_told_apart(selection, tmp_path):
    detector, eight, four = *selection.detectors, *selection.rows
    other = {"versions": {"torch": "2.14.0"}}
    table_of(selection, [made(detector, 1, 1), made(eight, 1, 1, **other), made(four, 1, 1)], tmp_path).write()
    assert [cells(tmp_path / "table.md", item)[-2] for item in (NAME, eight.model, four.model)] == ["1", "2", "1"]


def test_rows_of_earlier_commands_stay(selection, tmp_path):
    detector, eight, four = *selection.detectors, *selection.rows
    table_of(selection, [made(detector, 46, 41), made(eight, 45, 40), Entry(four)], tmp_path).write()
    only_four = Selection([detector], [four])
    table_of(only_four, [made(detector, 46, 41), made(four, 20, 20)], tmp_path).write()
    rows = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [detector.name, four.name, eight.name]
    assert rows[2]["ours"] == {"box": 45.0, "mask": 40.0}
    assert cells(tmp_path / "table.md", eight.model)[7] == "45.0 / 40.0"


def test_rows_of_other_data_are_not_mixed_in(selection, tmp_path):
    table_of(selection, [made(selection.detectors[0], 46, 41)], tmp_path).write()
    with pytest.raises(BadInputError, match="other data; use another --work-dir"):
        table_of(selection, [], tmp_path, data=Data("mini", {TRAIN: 92, VAL: 66}, {TRAIN: "d", VAL: "e"}))


@pytest.mark.parametrize("content", ["[]", "{", '{"rows": [1]}'])
def test_another_file_of_that_name_is_refused(selection, tmp_path, content):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(BadInputError, match=r"table.json is no table of this command"):
        table_of(selection, [], tmp_path)


def test_rows_of_other_weights_name_them(selection, tmp_path):
    detector, (eight, four) = selection.detectors[0], selection.rows
    table_of(replace(selection, rows=[eight]), [made(detector, 46, 41), made(eight, 45, 40)], tmp_path).write()
    weights = examined_coco(selection).checkpoints[detector.name]
    anew = {detector.name: replace(weights, sha256="b" * 64)}
    entries = [made(detector, 46, 41), made(four, 20, 20)]
    table_of(replace(selection, rows=[four]), entries, tmp_path, checkpoints=anew).write()
    notes = [line for line in (tmp_path / "table.md").read_text().splitlines() if line.startswith("* weights of")]
    assert len(notes) == 2
    assert next(line for line in notes if "b" * 64 in line).startswith(
        f"* weights of {detector.name} in {detector.name}, {four.name}:"
    )
    assert next(line for line in notes if weights.sha256 in line).startswith(
        f"* weights of {detector.name} in {eight.name}:"
    )


def test_a_full_disk_leaves_the_table_as_it_was(selection, tmp_path, monkeypatch):
    detector = selection.detectors[0]
    table_of(selection, [Entry(detector)], tmp_path).write()
    before = {path.name: path.read_bytes() for path in tmp_path.glob("table*")}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        table_of(selection, [made(detector, 46, 41)], tmp_path).write()
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*table*")} == before
