"""``quantize_detector``: what reaches the calibration, and what stays of it. What comes of it: test_docs."""

import inspect
from typing import Any
from unittest.mock import patch

import mmdet
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from apq_mmdet.calibration.reports import CalibrationReport
from apq_mmdet.datasets import calibration
from apq_mmdet.engine import detector, quantize_detector, save_detector
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import quantized_layers

register_all_modules()
FCOS = dict(
    type="FCOS",
    backbone=dict(
        type="SwinTransformer",
        embed_dims=8,
        depths=(1, 1),
        num_heads=(1, 2),
        strides=(4, 2),
        out_indices=(0, 1),
        with_cp=True,
    ),
    neck=dict(type="FPN", in_channels=[8, 16], out_channels=8, num_outs=2),
    bbox_head=dict(type="FCOSHead", num_classes=2, in_channels=8, feat_channels=8, strides=[4, 8], norm_cfg=None),
)
IMAGES = [dict(inputs=None, data_samples=None)]  # nothing runs on them
UNSEEN = "backbone.stages.1.blocks.0.ffn.layers.1"


@pytest.fixture
def model():
    built = MODELS.build(FCOS)
    built.cfg = Config(dict(model=FCOS))
    return built


@pytest.fixture
def handed(monkeypatch) -> dict[str, Any]:
    """What the calibration is called with, which is left out and tells of one layer without data."""
    signature, seen = inspect.signature(detector.calibrate), {}

    def note(*args, **kwargs):
        seen.update(signature.bind(*args, **kwargs).arguments)
        return CalibrationReport([], [UNSEEN], 0.0)

    monkeypatch.setattr(detector, "calibrate", note)
    return seen


def test_the_seed_that_is_given_is_the_calibrations(model, handed):
    quantize_detector(model, IMAGES, "minmax", seed=7)
    assert handed["seed"] == 7


def test_gradients_can_be_taken_in_a_detector_that_saves_memory_in_training(model, handed):
    switches = [part for part in model.modules() if getattr(part, "with_cp", False)]
    assert switches
    quantize_detector(model, IMAGES, "minmax")
    assert not any(part.with_cp for part in switches)


def test_layers_without_data_are_float_in_the_config_too(model, handed):
    quantize_detector(model, IMAGES, "minmax")
    rules = model.cfg.model.quant.overrides.values()
    assert [(rule.pattern, rule.float) for rule in rules] == [(UNSEEN, True)]


@pytest.fixture
def steps() -> list[dict[str, Any]]:
    """Of a test pipeline that starts from files."""
    keys = ("img_path", "ori_shape", "img_shape", "scale_factor")
    load, pack = dict(type="LoadImageFromFile", to_float32=True), dict(type="PackDetInputs", meta_keys=keys)
    return [load, dict(type="Resize", scale=(32, 32), keep_ratio=True), pack]


def test_a_detector_that_was_shown_an_array_is_saved_as_one_that_reads_files(
    model, handed, steps, tmp_path, monkeypatch
):
    model.cfg.test_dataloader = dict(dataset=dict(type="CocoDataset", pipeline=steps))
    model.dataset_meta = dict(classes=("a", "b"), palette=[(1, 2, 3), (4, 5, 6)])
    monkeypatch.setattr(model, "test_step", lambda _: [None])  # what is detected does not matter
    inference_detector(model, np.zeros((32, 32, 3), np.uint8))
    first = model.cfg.test_dataloader.dataset.pipeline[0]
    assert first.type == "mmdet.LoadImageFromNDArray"
    assert calibration.test_pipeline(model.cfg) == steps
    quantize_detector(model, IMAGES, "minmax")
    assert model.cfg.test_dataloader.dataset.pipeline == steps
    model.cfg.test_dataloader.dataset.pipeline[0] = first
    with patch.object(detector, "save_quantized") as saved:
        save_detector(model, tmp_path)
    assert Config.fromfile(tmp_path / "config.py").test_dataloader.dataset.pipeline == steps
    assert saved.call_args.args[2] == {"dataset_meta": model.dataset_meta}  # with tuples, which mmengine draws with


def test_a_detector_around_another_one_is_refused_in_scope_backbone(model, handed):
    """Of a semi-supervised one all would be taken for the backbone."""
    model.teacher = torch.nn.ModuleDict(dict(backbone=model.backbone))
    del model.backbone
    with pytest.raises(BadInputError, match=r"a FCOS has no backbone of its own; quantize the detector inside of it"):
        quantize_detector(model, IMAGES, "minmax")
    assert not handed
    assert not list(quantized_layers(model))


def test_heads_that_no_task_runs_are_refused_in_scope_detector(model, handed):
    with pytest.raises(BadInputError, match=r"not those of this FCOS \(FCOSHead\); use scope 'backbone'"):
        quantize_detector(model, IMAGES, "minmax", scope="detector")
    assert not handed
    assert not list(quantized_layers(model))


def dino() -> dict[str, Any]:
    """mmdet's own, small."""
    cfg = Config.fromfile(f"{mmdet.__path__[0]}/.mim/configs/dino/dino-4scale_r50_8xb2-12e_coco.py").model
    cfg.backbone = dict(FCOS["backbone"], depths=(1, 1), out_indices=(0, 1))
    cfg.neck.in_channels = [8, 16]
    cfg.neck.num_outs = cfg.num_feature_levels = 2
    for part, layers in (("encoder", 1), ("decoder", 2)):
        cfg[part].num_layers = layers
        attention = cfg[part].layer_cfg["self_attn_cfg" if part == "encoder" else "cross_attn_cfg"]
        attention.num_levels = 2
    cfg.num_queries = 10
    return cfg


def test_the_config_is_that_from_which_a_detr_was_built(handed):
    """Whose constructors write into the configs of their parts what they refuse to find there."""
    cfg = Config(dict(model=dino()))
    built = MODELS.build(cfg.model)
    built.cfg = cfg
    assert cfg.model.bbox_head.num_pred_layer == 3
    assert cfg.model.dn_cfg.embed_dims == 256
    quantize_detector(built, IMAGES, "minmax")
    assert not {"share_pred_layer", "num_pred_layer", "as_two_stage"} & set(built.cfg.model.bbox_head)
    assert hasattr(MODELS.build(built.cfg.model), "quantization_table")


def test_a_config_from_which_no_detector_can_be_built_is_refused_before_the_work(model, handed):
    model.cfg = Config(dict(model=dict(FCOS, bbox_head=dict(FCOS["bbox_head"], no_such_argument=1))))
    with pytest.raises(BadInputError, match=r"no quantized detector can be built, .*no_such_argument"):
        quantize_detector(model, IMAGES, "minmax")
    assert not handed
    assert not list(quantized_layers(model))


@pytest.fixture
def saved(model, handed, monkeypatch):
    """A quantized detector whose checkpoint is an empty file."""
    quantize_detector(model, IMAGES, "minmax")
    model.dataset_meta = {}
    monkeypatch.setattr(detector, "save_quantized", lambda model, path, meta: path.touch())
    return model


def test_a_config_of_the_users_is_not_replaced(saved, tmp_path):
    (tmp_path / "config.py").write_text("mine = 1\n")
    with pytest.raises(BadInputError, match=r"save_detector .* holds a config.py that was not written by a run"):
        save_detector(saved, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.py"]


def test_nothing_of_other_weights_stays_beside_what_is_saved(saved, tmp_path):
    save_detector(saved, tmp_path)
    for name in ("report.json", "run_config.py"):
        (tmp_path / name).touch()
    save_detector(saved, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"quantized.pth", "config.py"}
