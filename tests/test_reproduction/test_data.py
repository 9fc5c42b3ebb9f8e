import json

import pytest
from mmengine.config import Config

from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction.data import TRAIN, VAL, Data, check_layout, on_data, read_split, refuse_other_data


@pytest.mark.parametrize(
    "lost", ["annotations/instances_train2017.json", "annotations/instances_val2017.json", "train2017", "val2017"]
)
def test_what_a_data_root_lacks(data_root, lost):
    check_layout(data_root)
    (data_root / lost).rename(data_root / "elsewhere")
    with pytest.raises(BadInputError, match=f"has no {lost}; expected annotations/instances_train2017.json"):
        check_layout(data_root)


def test_reading_a_split(data_root):
    split = read_split(data_root, VAL)
    assert len(split.files) == 4
    name, width, height = split.files[0]
    assert (data_root / VAL / name).is_file()
    assert width > 50 < height


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "JSONDecodeError"),
        ('{"images": []}', "KeyError: 'annotations'"),
        ('{"images": [], "annotations": [1], "categories": [1]}', "no images"),
        ('{"images": [{"id": 1}], "annotations": [1], "categories": [1]}', "KeyError: 'file_name'"),
        ("[]", "TypeError"),
    ],
)
def test_broken_annotation_files(data_root, text, message):
    path = data_root / "annotations" / "instances_train2017.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match=rf"{path} cannot be read: .*{message}.*download it again"):
        read_split(data_root, TRAIN)


def test_only_coco_is_coco():
    coco = Data("root", {"train2017": 118_287, "val2017": 5_000}, {})
    part = Data("root", {"train2017": 118_287, "val2017": 4_999}, {})
    refuse_other_data(coco, accepted=False)
    assert str(coco).startswith("COCO 2017 (118,287 images")
    with pytest.raises(BadInputError, match=r"NOT COCO 2017.* 4,999 images in val2017.*has .*5,000.*--not-coco"):
        refuse_other_data(part, accepted=False)
    refuse_other_data(part, accepted=True)
    assert str(part).startswith("NOT COCO")


def test_a_config_is_pointed_to_the_data(tmp_path):
    text = json.dumps({"type": "RepeatDataset", "times": 2, "dataset": {"data_root": "a/", "ann_file": "b.json"}})
    (tmp_path / "config.py").write_text(
        f"train_dataloader = dict(dataset={text})\n"
        "test_dataloader = dict(dataset=dict(data_root='a/', ann_file='b.json', pipeline=[1]))\n"
        "test_evaluator = [dict(ann_file='a/b.json')]\n"
    )
    before = Config.fromfile(tmp_path / "config.py")
    after = on_data(before, tmp_path)
    assert after.train_dataloader.dataset.dataset.to_dict() == {
        "data_root": f"{tmp_path}/",
        "ann_file": "annotations/instances_train2017.json",
        "data_prefix": {"img": "train2017/"},
    }
    assert after.test_dataloader.dataset.ann_file == "annotations/instances_val2017.json"
    assert after.test_dataloader.dataset.pipeline == [1]
    assert after.test_evaluator[0].ann_file == f"{tmp_path}/annotations/instances_val2017.json"
    assert before.test_evaluator[0].ann_file == "a/b.json"
