import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import CHECKPOINT
from mmengine.config import Config
from reproduction_trial import NAME, write_index

from apq_mmdet.datasets.calibration import calibration_from_config, choose
from apq_mmdet.engine.plan import make_plan
from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction.costs import row_cost
from apq_mmdet.reproduction.data import TRAIN, VAL
from apq_mmdet.reproduction.prepare import check_quickly, estimate, examine, write_ids
from apq_mmdet.reproduction.rows import select


@pytest.fixture
def four_bits(index):
    return select(index, [f"{NAME}_apq-w4a4"], num_calib=[2])


def test_what_is_examined(selection, settings, tmp_path):
    check_quickly(selection, settings)
    found = examine(selection, settings)
    assert (found.data.images, found.data.is_coco) == ({TRAIN: 8, VAL: 4}, False)
    assert found.checkpoints[NAME].verified
    assert not found.checkpoints[NAME].converted
    assert os.path.isfile(found.sample)
    row = selection.rows[1]
    cfg = Config.fromfile(settings.config(row.name))
    assert (cfg.model.quant.w_bits, cfg.model.type) == (4, "apq_mmdet.MaskRCNN")
    images = calibration_from_config(cfg, 2, 0)  # the rule of every quantization
    assert found.images[row.name] == list(zip(images.ids, images.paths, strict=True))
    assert all(str(settings.data_root / TRAIN) in path for path in images.paths)
    conditions = found.conditions
    assert conditions[selection.rows[0].name] != conditions[row.name]
    assert (conditions[row.name]["num_calib"], conditions[row.name]["seed"]) == (2, 0)
    assert conditions[NAME]["annotations_sha256"] == found.data.sha256
    write_ids(row, found.images[row.name], found.data, tmp_path / "ids.json")
    listed = json.loads((tmp_path / "ids.json").read_text())
    assert (listed["number"], listed["seed"], listed["annotations_sha256"]) == (2, 0, found.data.sha256[TRAIN])
    assert listed["images"] == [
        {"id": image_id, "file_name": os.path.basename(path)} for image_id, path in found.images[row.name]
    ]


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def test_a_truncated_evaluated_image(four_bits, settings):
    path = sorted((settings.data_root / VAL).iterdir())[2]
    truncate(path)
    with pytest.raises(BadInputError, match=rf"evaluated images cannot be used: {path}: .*truncated"):
        examine(four_bits, settings)


def test_a_truncated_calibration_image(four_bits, settings):
    for path in (settings.data_root / TRAIN).iterdir():
        truncate(path)
    with pytest.raises(BadInputError, match=r"calibration images cannot be used: .*truncated"):
        examine(four_bits, settings)


def test_an_image_that_is_not_used_may_be_broken(four_bits, settings):
    images = [(number + 1, f"{number:06d}.jpg") for number in range(8)]
    used = {name for _, name in choose(images, 2, 0, "the training set")}
    for path in (settings.data_root / TRAIN).iterdir():
        if path.name not in used:
            path.unlink()
    examine(four_bits, settings)


def test_training_images_that_are_evaluated_images(four_bits, settings):
    annotations, train = settings.data_root / "annotations", settings.data_root / TRAIN
    shutil.copy(annotations / "instances_val2017.json", annotations / "instances_train2017.json")
    shutil.rmtree(train)
    train.symlink_to(settings.data_root / VAL)
    with pytest.raises(
        BadInputError, match=r"2 of 2 calibration images are evaluated images.*; --allow-overlap accepts"
    ):
        examine(four_bits, settings)
    examine(four_bits, replace(settings, allow_overlap=True))


def test_other_data_is_refused(four_bits, settings):
    with pytest.raises(BadInputError, match="NOT COCO 2017: 8 images"):
        examine(four_bits, replace(settings, not_coco=False))


def test_too_few_images(index, settings):
    with pytest.raises(BadInputError, match="9 calibration images asked for, the training set holds 8"):
        examine(select(index, num_calib=[9]), settings)


def test_a_config_that_is_not_what_the_metafile_says(selection, settings):
    row = replace(selection.rows[1], a_bits=8)
    with pytest.raises(BadInputError, match=r"metafile says recipe, bits and scope \('apq', 4, 8, 'backbone'\)"):
        examine(replace(selection, rows=[row]), settings)


def test_a_config_that_quantizes_nothing(selection, settings):
    row = replace(selection.rows[1], config=selection.detectors[0].config)
    with pytest.raises(BadInputError, match=r"holds no model.quant"):
        examine(replace(selection, rows=[row]), settings)


def foreign(state):
    """The demo detector as Microsoft's code would name and order it."""
    names = {"stages.": "layers.", "attn.w_msa.": "attn.", "ffn.layers.0.0.": "mlp.fc1.", "ffn.layers.1.": "mlp.fc2."}
    converted = {}
    for key, value in state.items():
        if key.startswith("backbone."):
            for ours, theirs in {**names, "patch_embed.projection": "patch_embed.proj"}.items():
                key = key.replace(ours, theirs)
            if ".downsample." in key:
                value = value.unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
        converted[key] = value
    return converted


def test_a_foreign_checkpoint_is_converted(four_bits, settings):
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    path = next(settings.checkpoints.iterdir())
    path.unlink()
    torch.save({"model": foreign(state)}, settings.checkpoints / "theirs.pth")
    detector = replace(four_bits.detectors[0], weights="https://example.org/theirs.pth")
    found = examine(replace(four_bits, detectors=[detector], rows=[]), settings).checkpoints[NAME]
    assert (found.converted, found.verified) == (True, False)
    converted = torch.load(found.path, weights_only=True)["state_dict"]
    assert converted.keys() == state.keys()
    assert all(torch.equal(converted[key], value) for key, value in state.items())


def test_a_checkpoint_of_another_detector(four_bits, settings):
    torch.save({"state_dict": {"backbone.weight": torch.ones(1)}}, settings.checkpoints / "other.pth")
    detector = replace(four_bits.detectors[0], weights="https://example.org/other.pth")
    with pytest.raises(BadInputError, match=r"other.pth is of another architecture.*cannot be converted either"):
        examine(replace(four_bits, detectors=[detector], rows=[]), settings)


def test_costs_are_those_of_the_plan(four_bits, settings, monkeypatch):
    plans = []
    monkeypatch.setattr(
        "apq_mmdet.reproduction.costs.make_plan", lambda *args: plans.append(make_plan(*args)) or plans[-1]
    )
    settings = replace(settings, memory_budget=2**-20)  # 1 KiB: all that is captured goes to the disk
    costs = estimate(four_bits, examine(four_bits, settings), settings)
    plan, cost = plans[0], costs[four_bits.rows[0].name]
    assert cost.calibration_seconds == pytest.approx(plan.calibration_seconds)
    assert cost.evaluation_seconds == pytest.approx(4 * plan.seconds)
    assert cost.temporary_bytes == plan.disk_bytes > 1e6
    assert cost.memory_bytes == plan.sizes.state_float + 2**10
    assert cost.kept_bytes > plan.sizes.state_packed
    assert costs[NAME].calibration_seconds == 0 < costs[NAME].evaluation_seconds


def test_processes_share_the_time(index, settings):
    selection = select(index, [f"{NAME}_apq-w4a4"], num_calib=[8])
    row = selection.rows[0]
    found = examine(selection, settings)
    cfg = Config.fromfile(settings.config(row.name))
    many = replace(row, num_calib=32)
    images = found.images[row.name] * 4

    def seconds(processes):
        cost = row_cost(many, cfg, found.checkpoints[NAME], images, 4, processes, 2**30)
        return cost.calibration_seconds / cost.evaluation_seconds / processes  # in forwards

    one = seconds(1)
    assert seconds(2) == pytest.approx(one / 2)
    assert seconds(3) == pytest.approx(one / 2)  # shards of eight: one process has two of the four
    assert seconds(8) == pytest.approx(one / 4)


def test_a_recipe_that_learns_keeps_whole_blocks(detector, tmp_path, settings):
    selection = select(write_index(tmp_path, detector, [("brecq", 4)]), num_calib=[2])
    costs = estimate(selection, examine(selection, settings), settings)
    state = CHECKPOINT.stat().st_size
    assert costs[selection.rows[0].name].kept_bytes > costs[NAME].kept_bytes + state


def test_a_checkpoint_that_needs_no_conversion_is_refused_for_what_is_wrong_with_it(four_bits, settings):
    content = torch.load(CHECKPOINT, weights_only=True)
    content["state_dict"]["rpn_head.rpn_conv.weight"].fill_(float("nan"))
    torch.save({**content, "meta": {"mmengine_version": "0.10"}}, settings.checkpoints / "nan.pth")
    detector = replace(four_bits.detectors[0], weights="https://example.org/nan.pth")
    with pytest.raises(BadInputError, match="NaN") as caught:
        examine(replace(four_bits, detectors=[detector], rows=[]), settings)
    assert "convert" not in str(caught.value)


def test_converted_weights_may_lie_in_the_work_dir_of_the_originals(four_bits, settings):
    settings = replace(settings, work_dir=settings.checkpoints.parent)
    torch.save(
        {"model": foreign(torch.load(CHECKPOINT, weights_only=True)["state_dict"])}, settings.checkpoints / "theirs.pth"
    )
    detector = replace(four_bits.detectors[0], weights="https://example.org/theirs.pth")
    assert examine(replace(four_bits, detectors=[detector], rows=[]), settings).checkpoints[NAME].converted


def test_a_users_config_is_not_overwritten(four_bits, settings, tmp_path):
    own = tmp_path / "mine" / "configs" / f"{NAME}.py"
    own.parent.mkdir(parents=True)
    own.write_text(Path(four_bits.detectors[0].config).read_text() + "# mine\n")
    detector = replace(four_bits.detectors[0], config=own)
    with pytest.raises(BadInputError, match="--work-dir: the run would overwrite"):
        examine(replace(four_bits, detectors=[detector], rows=[]), replace(settings, work_dir=tmp_path / "mine"))
    assert own.read_text().endswith("# mine\n")
