"""Distillation tasks of detectors with queries, of mask transformers and of dense heads with boxes of any scale."""

import mmdet.models.detectors.ddq_detr as ddq_detr
import pytest
import torch
import torch.nn.functional as F
from helpers import recipe, short_grids
from mmcv.ops import batched_nms
from mmdet.models.layers.transformer import DetrTransformerDecoderLayer, DetrTransformerEncoderLayer
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from support_table import CONFIGS, seeded_detector, small_config

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import tensors_of
from apq_mmdet.layers import float_only, quantize_model
from apq_mmdet.layers.activation_checkpointing import disable_activation_checkpointing
from apq_mmdet.layers.attention import ProductMultiheadAttention
from apq_mmdet.models import detection_task
from apq_mmdet.models.distillation import NeckTask, WeightedDenseTask
from apq_mmdet.models.losses import prepare
from apq_mmdet.models.set_prediction import MaskTask, QueryTask

register_all_modules()
DETECTORS = {
    "DINO": ("dino/dino-5scale_swin-l_8xb2-12e_coco.py", QueryTask),
    "DDQDETR": ("ddq/ddq-detr-4scale_swinl_8xb2-30e_coco.py", QueryTask),
    "DeformableDETR": ("v3det/deformable-detr-refine-twostage_swin_16xb2_sample1e-3_v3det_50e.py", QueryTask),
    "Mask2Former": ("mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py", MaskTask),
    "MaskFormer": ("maskformer/maskformer_swin-l-p4-w12_64xb1-ms-300e_coco.py", MaskTask),
    "ATSS": ("dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco.py", WeightedDenseTask),
    "RTMDet": ("rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py", WeightedDenseTask),
}
TRANSFORMERS = ("DINO", "Mask2Former", "MaskFormer")
TRANSFORMER_LAYERS = (DetrTransformerEncoderLayer, DetrTransformerDecoderLayer)
WITH_QUERIES = [name for name, (_, task) in DETECTORS.items() if task is QueryTask]


@pytest.fixture
def detector(request, tmp_path):
    return seeded_detector(small_config(CONFIGS / DETECTORS[request.param][0], tmp_path))


@pytest.fixture
def sample():
    height, width = 64, 96
    meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), img_id=0)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return dict(inputs=image, data_samples=DetDataSample(metainfo=meta))


def detectors(*names):
    return pytest.mark.parametrize("detector", names, indirect=True)


@detectors(*DETECTORS)
@torch.no_grad()
def test_outputs_are_those_of_the_detector(detector, sample):
    task = detection_task(detector)
    assert type(task) is DETECTORS[type(detector).__name__][1]
    teacher, context = task.teacher(detector, sample)
    student = task.student(detector, sample, context)
    inputs, data_samples = prepare(detector, sample)
    for want, first, second in zip(detector(inputs, data_samples, mode="tensor"), teacher, student, strict=False):
        for w, f, s in zip(want, first, second, strict=True):
            assert torch.equal(w, f)
            assert torch.equal(w, s)
    assert float(task.loss(student, teacher, context)) == pytest.approx(0, abs=1e-6)


@detectors(*DETECTORS)
def test_heads_of_other_classes_are_not_run(detector):
    name = "panoptic_head" if hasattr(detector, "panoptic_head") else "bbox_head"
    head = getattr(detector, name)
    head.__class__ = type("Another", (type(head),), {})
    assert type(detection_task(detector)) is NeckTask


@detectors(*TRANSFORMERS)
@torch.no_grad()
def test_modules_in_the_place_of_attention_keep_the_float_function(detector, sample):
    task = detection_task(detector)
    teacher, context = task.teacher(detector, sample)
    quantize_model(detector, recipe("minmax", scope="detector").policy)
    assert any(isinstance(module, ProductMultiheadAttention) for module in detector.modules())
    with float_only(detector):
        student = task.student(detector, sample, context)
    for want, got in zip(tensors_of(teacher), tensors_of(student), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@detectors(*WITH_QUERIES)
@torch.no_grad()
def test_the_student_takes_the_teachers_queries(detector, sample):
    task = detection_task(detector)
    (logits, boxes, proposals), context = task.teacher(detector, sample)
    detector.bbox_head.cls_branches[detector.decoder.num_layers].weight.normal_()  # it chooses, and does nothing else
    other = task.student(detector, sample, context)
    assert torch.equal(other[0], logits)
    assert torch.equal(other[1], boxes)
    assert not torch.equal(other[2][0], proposals[0])
    (_, chosen_anew, _), _ = task.teacher(detector, sample)
    assert not torch.equal(chosen_anew, boxes)


@detectors("DDQDETR")
@torch.no_grad()
def test_suppression_in_the_decoder_is_the_teachers(detector, sample):
    last = detector.bbox_head.reg_branches[0][-1]
    last.weight.zero_()
    last.bias.fill_(20.0)  # all boxes of the first layer are the whole image
    task = detection_task(detector)
    (logits, boxes, _), context = task.teacher(detector, sample)
    detector.bbox_head.cls_branches[0].weight.normal_()  # its scores decide whom the second layer listens to
    other = task.student(detector, sample, context)
    assert not torch.equal(other[0][0], logits[0])
    assert torch.equal(other[0][1], logits[1])
    assert torch.equal(other[1], boxes)
    (chosen_anew, _, _), _ = task.teacher(detector, sample)
    assert not torch.equal(chosen_anew[1], logits[1])
    assert ddq_detr.batched_nms is batched_nms


def bernoulli(logits, logits_t):
    """KL(teacher || student) of each element, by cross entropy less entropy."""
    p = logits_t.sigmoid()
    cross, own = (F.binary_cross_entropy_with_logits(x, p, reduction="none") for x in (logits, logits_t))
    return cross - own


def test_loss_of_queries():
    shapes = [(2, 1, 3, 5), (2, 1, 3, 4), (1, 7, 5), (1, 7, 4)]
    (s, s_box, s_enc, s_del), (t, t_box, t_enc, t_del) = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    wanted = bernoulli(s, t).mean() + bernoulli(s_enc, t_enc).mean()
    for box, box_t, score in ((s_box, t_box, t), (s_del, t_del, t_enc)):
        best = score.sigmoid().max(-1).values
        wanted += ((box - box_t).abs().mean(-1) * best).sum() / best.sum()
    got = QueryTask().loss((s, s_box, [s_enc, s_del]), (t, t_box, [t_enc, t_del]), [])
    torch.testing.assert_close(got, wanted)
    without = QueryTask().loss((s, s_box, []), (t, t_box, []), [])
    assert without < got


def test_loss_of_masks():
    shapes = [(1, 3, 5), (1, 3, 4, 4)]
    (s, s_mask), (t, t_mask) = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    p, q = t.softmax(-1), s.softmax(-1)
    there = 1 - p[..., -1]
    wanted = (p * (p / q).log()).sum(-1).mean()
    wanted += (bernoulli(s_mask, t_mask).mean((-2, -1)) * there).sum() / there.sum()
    got = MaskTask().loss(([s], [s_mask]), ([t], [t_mask]), None)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(MaskTask().loss(([s, s], [s_mask] * 2), ([t, t], [t_mask] * 2), None), 2 * wanted)


@pytest.mark.parametrize("centerness", [False, True])
def test_loss_of_dense_boxes_has_no_scale(centerness):
    shapes = [(1, 5, 4, 6), (1, 4, 4, 6), (1, 1, 4, 6)][: 2 + centerness]
    student, teacher = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    best = teacher[0].sigmoid().amax(1)
    gap, size = ((t.abs().sum(1) * best).sum() for t in (student[1] - teacher[1], teacher[1]))
    wanted = bernoulli(student[0], teacher[0]).mean() + gap / size
    if centerness:
        wanted = wanted + bernoulli(student[2], teacher[2]).mean()
    levels = [[[t] for t in part] for part in (student, teacher)]
    torch.testing.assert_close(WeightedDenseTask().loss(*levels, None), wanted)
    for part in levels:
        part[1][0] = 8 * part[1][0]
    torch.testing.assert_close(WeightedDenseTask().loss(*levels, None), wanted)


@detectors(*DETECTORS)
def test_every_block_of_the_detector_is_searched(detector, sample):
    """A gradient reaches every block, or the search would refuse."""
    search = dict(grids=short_grids(2), rounds=1, rows=0, windows=0, shortlist=0)
    settings = recipe("apq", scope="detector", w_bits=8, a_bits=8, search=search)
    disable_activation_checkpointing(detector)
    table = quantize_model(detector, settings.policy)
    report = calibrate(detector, [sample], settings, detection_task(detector))
    searched = {f"{block.block}.{factor}".rsplit(".", 1)[0] for block in report.blocks for factor in block.factors}
    assert searched == {row.layer for row in table if row.bits}
    layers = [name for name, module in detector.named_modules() if isinstance(module, TRANSFORMER_LAYERS)]
    assert set(layers) <= {block.block for block in report.blocks}
    assert bool(layers) == ("DETR" in type(detector).__name__ or type(detector).__name__ in TRANSFORMERS)
