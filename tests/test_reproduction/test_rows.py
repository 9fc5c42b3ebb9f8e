import pytest
import yaml

from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction.rows import AP, INDEX, select

T = "mask-rcnn_swin-t-p4-w7_fpn_1x_coco"


def test_the_projects_own_rows():
    found = select(INDEX)
    assert {(row.recipe, row.bits, row.scope) for row in found.rows} >= {
        (recipe, bits, "backbone") for recipe in ("apq", "apq_plus") for bits in ("W8A8", "W6A6", "W4A4")
    }
    detector = next(d for d in found.detectors if d.name == T)
    assert detector.reference == AP(42.7, 39.3)
    assert detector.weights.endswith("-9d6b7cfa.pth")
    row = next(row for row in found.rows if row.model == f"{T}_apq-plus-w4a4")
    assert row.name == f"{T}_apq-plus-w4a4_calib32_seed0"
    assert (row.recipe, row.w_bits, row.a_bits, row.detector) == ("apq_plus", 4, 4, detector)


def test_patterns_bring_their_float_detector():
    found = select(INDEX, [f"{T}_apq-w4*", f"{T}_apq-w6a6"])
    assert [d.name for d in found.detectors] == [T]
    assert sorted(row.model for row in found.rows) == [f"{T}_apq-w4a4", f"{T}_apq-w6a6"]


def test_a_float_detector_alone():
    found = select(INDEX, [T])
    assert [d.name for d in found.detectors] == [T]
    assert found.rows == []


def test_a_row_for_every_number_of_images_and_seed():
    rows = select(INDEX, [f"{T}_apq-w4a4"], num_calib=[32, 256], seeds=[0, 1]).rows
    assert [(row.num_calib, row.seed) for row in rows] == [(32, 0), (32, 1), (256, 0), (256, 1)]
    assert len({row.name for row in rows}) == 4


def test_a_pattern_that_matches_nothing():
    with pytest.raises(BadInputError, match=rf"'{T}_apq-w4a5' matches no model.*nearest is '{T}_apq-w4a4'"):
        select(INDEX, [f"{T}_apq-w4a5"])


def change(index, **changes):
    metafile = index.with_name("metafile.yml")
    content = yaml.safe_load(metafile.read_text())
    entry = content["Models"][1]
    for key, value in changes.items():
        entry["Metadata" if key == "Metadata" else key] = value
    metafile.write_text(yaml.safe_dump(content))


def test_ap_on_other_data_is_no_reference(index):
    metafile = index.with_name("metafile.yml")
    assert select(index).detectors[0].reference == AP(46.0, 41.7)
    metafile.write_text(metafile.read_text().replace("Dataset: COCO", "Dataset: drawn"))
    assert select(index).detectors[0].reference is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Config": "absent.py"}, "config .*absent.py does not exist"),
        ({"Metadata": {"Float model": "absent"}}, "unknown value 'absent'"),
        ({"Metadata": {}}, "lacks 'Weights'"),
        ({"Metadata": None}, "lacks 'Weights'"),
        ({"Metadata": [1]}, r"'Metadata' must hold keys and values, got \[1\]"),
        ({"Metadata": {"Float model": "mask-rcnn_swin-t-p4-w7_fpn_drawn-3x_coco"}}, "lacks 'Weight bits'"),
    ],
)
def test_broken_entries(index, changes, message):
    change(index, **changes)
    with pytest.raises(BadInputError, match=message):
        select(index)


@pytest.mark.parametrize(
    ("text", "message"), [("a: [", "cannot be read"), ("- a", "no 'Import'"), ("Models: []", "names no models")]
)
def test_broken_index(tmp_path, text, message):
    (tmp_path / "index.yml").write_text(text)
    with pytest.raises(BadInputError, match=message):
        select(tmp_path / "index.yml")


@pytest.mark.parametrize("key", ["Models", "Import"])
def test_a_part_without_content_names_no_models(tmp_path, key):
    (tmp_path / "index.yml").write_text(f"{key}:\n")
    with pytest.raises(BadInputError, match="names no models"):
        select(tmp_path / "index.yml")


def test_results_without_content_or_numbers(index):
    metafile = index.with_name("metafile.yml")
    text = yaml.safe_load(metafile.read_text())
    text["Models"][0]["Results"] = None
    metafile.write_text(yaml.safe_dump(text))
    assert select(index).detectors[0].reference is None
    result = dict(Task="Object Detection", Dataset="COCO", Metrics={"box AP": "n/a"})
    text["Models"][0]["Results"] = [result]
    metafile.write_text(yaml.safe_dump(text))
    with pytest.raises(BadInputError, match="'box AP' must be a number, got 'n/a'"):
        select(index)


def test_missing_index(tmp_path):
    with pytest.raises(BadInputError, match=r"absent.yml cannot be read"):
        select(tmp_path / "absent.yml")
