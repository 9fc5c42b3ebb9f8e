import pickle
from pathlib import Path

import mmdet
import pytest
import torch
from helpers import ROOT, recipe, short_grids
from mmdet.registry import MODELS
from mmdet.structures.bbox import get_box_tensor
from mmdet.utils import register_all_modules
from mmengine.config import Config

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import tensors_of
from apq_mmdet.errors import UncalibratedError
from apq_mmdet.layers import float_only, packed_state_dict, quantized_layers
from apq_mmdet.models import QuantizedDetector, QuantizedSwinTransformer, detection_task
from apq_mmdet.models.distillation import MAX_PROPOSALS, DenseTask, NeckTask, TwoStageTask
from apq_mmdet.models.losses import prepare

register_all_modules()
CONFIGS = ROOT / "configs"
MIM = Path(mmdet.__file__).parent / ".mim" / "configs"


def build(cfg):
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.eval()
    return model


def demo(name, **quant):
    cfg = Config.fromfile(CONFIGS / "demo" / f"{name}_swin-demo_apq-w8a8.py")
    cfg.model.quant.update(quant)
    return cfg


def sample(height=96, width=75):
    from mmdet.structures import DetDataSample

    meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), img_id=0)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return dict(inputs=image, data_samples=DetDataSample(metainfo=meta))


@pytest.mark.parametrize("name", ["mask-rcnn", "cascade-mask-rcnn"])
@pytest.mark.parametrize("scope", ["backbone", "detector"])
def test_config_inheritance(name, scope):
    cfg = demo(name, scope=scope)
    model = build(cfg)
    float_cfg = Config.fromfile(CONFIGS / "demo" / f"{name}_swin-demo.py")
    float_model = build(float_cfg)
    assert isinstance(model, QuantizedDetector)
    assert isinstance(model, type(float_model))
    quantized = [layer for layer, _ in quantized_layers(model)]
    assert all(layer.startswith("backbone.") for layer in quantized) == (scope == "backbone")
    assert not any(model.load_state_dict(float_model.state_dict()))
    data = sample()
    with torch.no_grad(), float_only(model):
        want, got = (
            m.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0].pred_instances
            for m in (float_model, model)
        )
    assert len(want) > 0
    assert torch.equal(want.bboxes, got.bboxes)
    assert torch.equal(want.masks, got.masks)


def test_inheritance_from_mmdet(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '{CONFIGS}/_base_/recipes/apq.py']\n"
        "model = dict(type='apq_mmdet.MaskRCNN', quant={{_base_.quant}}, backbone=dict(init_cfg=None))\n"
    )
    model = MODELS.build(Config.fromfile(tmp_path / "mine.py").model)
    assert isinstance(model, QuantizedDetector)
    assert len(list(quantized_layers(model))) == 1 + 12 * 6 + 3


def test_backbone_alone_in_a_float_detector():
    cfg = Config.fromfile(CONFIGS / "demo/mask-rcnn_swin-demo.py")
    quant = demo("mask-rcnn").model.quant
    cfg.model.backbone.update(type="apq_mmdet.SwinTransformer", quant=quant)
    model = build(cfg)
    assert isinstance(model.backbone, QuantizedSwinTransformer)
    assert not isinstance(model, QuantizedDetector)
    settings = recipe("minmax")
    calibrate(model.backbone, [torch.randn(1, 3, 64, 50)], settings)
    other = build(cfg)
    other.load_state_dict(
        {f"backbone.{k}": v for k, v in packed_state_dict(model.backbone).items()}
        | {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
    )
    x = torch.randn(1, 3, 64, 50)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model.backbone(x), other.backbone(x), strict=True))


@pytest.mark.parametrize("name", ["mask-rcnn", "cascade-mask-rcnn"])
def test_calibration_reaches_every_layer_of_the_whole_detector(name):
    settings = recipe("apq_fast", scope="detector", search=dict(grids=short_grids(3), shortlist=2))
    model = build(demo(name, scope="detector", w_bits=4, a_bits=4))
    report = calibrate(model, [sample()], settings, detection_task(model))
    searched = {f"{b.block}.{f}" for b in report.blocks for f in b.factors}
    quantizers = {f"{n}.{role}" for n, layer in quantized_layers(model) for role in layer.quantizers}
    assert searched == quantizers
    assert any("mask_head" in b.block for b in report.blocks)


@pytest.mark.parametrize("name", ["mask-rcnn", "cascade-mask-rcnn"])
@torch.no_grad()
def test_heads_are_judged_on_the_float_detectors_own_rois(name):
    model = build(Config.fromfile(CONFIGS / "demo" / f"{name}_swin-demo.py"))
    task, data = detection_task(model), sample()
    assert type(task) is TwoStageTask
    teacher, fixed = task.teacher(model, data)
    student = task.student(model, data, fixed)
    assert [len(student[1]), len(student[2])] == [len(fixed.bbox), len(fixed.bbox)]
    for got, want in zip(tensors_of(student), tensors_of(teacher), strict=True):
        assert torch.equal(got, want)
    assert float(task.loss(student, teacher, fixed)) == pytest.approx(0, abs=1e-6)
    inputs, samples = prepare(model, data)
    features = model.extract_feat(inputs)
    rpn = model.rpn_head(features)
    metas = [s.metainfo for s in samples]
    best = model.rpn_head.predict_by_feat(*rpn, batch_img_metas=metas, cfg=model.test_cfg.rpn)[0]
    assert bool((best.scores[:-1] >= best.scores[1:]).all())
    assert torch.equal(fixed.bbox[0][:, 1:], get_box_tensor(best.bboxes)[:MAX_PROPOSALS])
    for stage, rois in enumerate(fixed.bbox):
        args = (features, rois) if name == "mask-rcnn" else (stage, features, rois)
        found = model.roi_head._bbox_forward(*args)
        assert torch.equal(student[1][stage][0], found["cls_score"])
        assert torch.equal(student[1][stage][1], found["bbox_pred"])
    if name == "cascade-mask-rcnn":
        assert not torch.equal(fixed.bbox[1], fixed.bbox[0])


@pytest.mark.parametrize("name", ["mask-rcnn", "cascade-mask-rcnn"])
def test_empty_rois(name):
    model = build(demo(name, scope="detector"))
    calibrate(model, [sample()], recipe("minmax", scope="detector"), detection_task(model))
    features = [torch.randn(1, 64, s, s) for s in (16, 8, 4, 2)]
    rois = torch.zeros(0, 5)
    args = (features, rois) if name == "mask-rcnn" else (2, features, rois)
    with torch.no_grad():
        assert model.roi_head._bbox_forward(*args)["cls_score"].shape == (0, 9)
        assert model.roi_head._mask_forward(*args)["mask_preds"].shape[0] == 0
        model.test_cfg.rcnn.score_thr = 1.1  # nothing is detected: the mask head never runs
        model.roi_head.test_cfg.score_thr = 1.1
        data = sample()
        result = model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0]
    assert len(result.pred_instances) == 0


def test_uncalibrated_detector_says_what_to_do():
    model = build(demo("mask-rcnn"))
    data = sample()
    with pytest.raises(UncalibratedError, match="quantize_det"):
        model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))


def test_box_only_detectors():
    quant = demo("mask-rcnn").model.quant
    two_stage = Config.fromfile(CONFIGS / "demo/mask-rcnn_swin-demo.py")
    two_stage.model.roi_head.update(mask_head=None, mask_roi_extractor=None)
    two_stage.model.update(type="apq_mmdet.FasterRCNN", quant={**quant, "scope": "detector"})
    model = build(two_stage)
    settings = recipe("apq_fast", scope="detector", search=dict(grids=short_grids(2), shortlist=1))
    calibrate(model, [sample()], settings, detection_task(model))
    data = sample()
    result = model.test_step(dict(inputs=[data["inputs"]], data_samples=[data["data_samples"]]))[0]
    assert "masks" not in result.pred_instances


def test_retinanet_swin(tmp_path):
    (tmp_path / "mine.py").write_text(
        f"_base_ = ['mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py', '{CONFIGS}/_base_/recipes/apq_fast.py']\n"
        "model = dict(type='apq_mmdet.RetinaNet', quant={{_base_.quant}}, backbone=dict(init_cfg=None, embed_dims=24),"
        " neck=dict(in_channels=[48, 96, 192], out_channels=32), bbox_head=dict(in_channels=32, feat_channels=32))\n"
    )
    cfg = Config.fromfile(tmp_path / "mine.py")
    cfg.model.quant.update(scope="detector", w_bits=4, a_bits=4)
    model = build(cfg)
    settings = recipe("apq_fast", scope="detector", search=dict(grids=short_grids(2), shortlist=1))
    report = calibrate(model, [sample()], settings, detection_task(model))
    assert report.blocks[-1].block == "bbox_head"
    assert type(detection_task(model)) is DenseTask
    data = sample()
    with torch.no_grad(), float_only(model):
        teacher, context = detection_task(model).teacher(model, data)
        student = detection_task(model).student(model, data, context)
        want = model.bbox_head(model.extract_feat(prepare(model, data)[0]))
    for got, given, exact in zip(*map(tensors_of, (student, teacher, want)), strict=True):
        assert torch.equal(got, exact)
        assert torch.equal(given, exact)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("htc/htc_r50_fpn_1x_coco", NeckTask),
        ("scnet/scnet_r50_fpn_1x_coco", NeckTask),
        ("sabl/sabl-faster-rcnn_r50_fpn_1x_coco", NeckTask),
        ("sabl/sabl-cascade-rcnn_r50_fpn_1x_coco", NeckTask),
        ("mask_rcnn", TwoStageTask),
    ],
)
def test_heads_that_need_more_are_left_out_of_the_loss(name, task):
    """Semantic features and the like: a subclass of a known head may not run as that does."""
    cfg = Config.fromfile(MIM / f"{name}.py") if "/" in name else demo("mask-rcnn")
    if "/" in name:
        cfg.model.backbone = dict(type="SwinTransformer", embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
        cfg.model.neck.in_channels = [8, 16, 32, 64]
    model = MODELS.build(cfg.model).eval()
    found = detection_task(model)
    assert type(found) is task
    with torch.no_grad(), float_only(model):
        found.teacher(model, sample())


def test_gradients_can_be_taken_where_a_config_saves_memory_in_training():
    cfg = demo("mask-rcnn")
    cfg.model.backbone.with_cp = True
    switches = [part.with_cp for part in MODELS.build(cfg.model).modules() if hasattr(part, "with_cp")]
    assert switches
    assert not any(switches)


def test_a_quantized_detector_can_be_pickled():
    model = build(demo("mask-rcnn"))
    again = pickle.loads(pickle.dumps(model))
    assert type(again) is type(model)
    assert list(again.state_dict()) == list(model.state_dict())
