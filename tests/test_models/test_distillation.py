"""The losses of detectors with RPN and RoI heads, and what the float model chooses, against plain loops and mmdet."""

from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox2roi
from mmengine.config import Config

from apq_mmdet.errors import BadInputError
from apq_mmdet.models.distillation import (
    CONFIDENT,
    MAX_MASKS,
    FixedRois,
    NeckTask,
    TwoStageTask,
    _foreground,
    dense_loss,
    detection_task,
)

ANCHORS, CLASSES = 2, 3


def sigmoid_kl(logits, target):
    """Mean over all elements of the divergence of yes-or-no variables."""
    p, q = target.double().sigmoid(), logits.double().sigmoid()
    return float((p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()).mean())


def dense(levels):
    """Scores and deltas of an anchor head on feature maps of these sizes."""
    scores = [2 * torch.randn(1, ANCHORS * CLASSES, side, side) for side in levels]
    return scores, [torch.randn(1, ANCHORS * 4, side, side) for side in levels]


def dense_by_hand(student, teacher):
    total = 0.0
    for score, delta, score_t, delta_t in zip(*student, *teacher, strict=True):
        total += sigmoid_kl(score, score_t)
        errors = []
        for anchor in range(ANCHORS):
            for place in torch.cartesian_prod(*(torch.arange(side) for side in score.shape[2:])).tolist():
                at = (slice(None), *place)
                best = score_t[0][at][anchor * CLASSES : (anchor + 1) * CLASSES].sigmoid().max()
                if best > CONFIDENT:
                    gaps = (delta[0][at] - delta_t[0][at])[4 * anchor : 4 * anchor + 4].abs().double()
                    errors += [g**2 / 2 if g < 1 else g - 0.5 for g in gaps.tolist()]
        total += sum(errors) / len(errors)
    return total


def test_loss_of_anchor_heads():
    student, teacher = dense((5, 3)), dense((5, 3))
    assert abs(float(dense_loss(student, teacher)) - dense_by_hand(student, teacher)) < 1e-5


def test_loss_of_roi_heads():
    labels = torch.tensor([2, 0, 1])

    def heads():
        stages = [(2 * torch.randn(7, CLASSES + 1), torch.randn(7, 4 * CLASSES)) for _ in range(2)]
        return dense((4,)), stages, [torch.randn(3, CLASSES, 5, 5)]

    student, teacher = heads(), heads()
    want = dense_by_hand(student[0], teacher[0])
    for (score, delta), (score_t, delta_t) in zip(student[1], teacher[1], strict=True):
        p, q = score_t.double().softmax(1), score.double().softmax(1)
        want += float((p * (p / q).log()).sum(1).mean()) + float((delta - delta_t).double().abs().mean())
    mask, mask_t = (
        torch.stack([m[i, label] for i, label in enumerate(labels)]) for m in (student[2][0], teacher[2][0])
    )
    want += sigmoid_kl(mask, mask_t)
    loss = TwoStageTask().loss(student, teacher, FixedRois([], torch.zeros(3, 5), labels))
    assert abs(float(loss) - want) < 1e-5


def test_boxes_of_a_cascade_are_refined_as_mmdet_does():
    cfg = Config.fromfile(ROOT / "configs/demo/cascade-mask-rcnn_swin-demo.py")
    for box_head in cfg.model.roi_head.bbox_head:
        box_head.reg_class_agnostic = False  # the best class says which deltas count
    head = MODELS.build(cfg.model).eval().roi_head
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    features = tuple(torch.randn(1, 64, side, side) for side in (24, 12, 6, 3))
    corner = 40 * torch.rand(9, 2)
    rois = bbox2roi([torch.cat([corner, corner + 10 + 30 * torch.rand(9, 2)], 1)])
    meta = dict(img_shape=(96, 96), scale_factor=(1.0, 1.0))
    with torch.no_grad():
        outputs, boxes = TwoStageTask()._run_teacher_stages(head, features, rois, meta)
        refined, scores, deltas = head._refine_roi(features, rois, [meta], (len(rois),))
    assert not torch.equal(boxes[1], boxes[0])
    assert torch.equal(boxes[-1], refined[0])
    assert torch.allclose(torch.stack([score for score, _ in outputs]).mean(0), scores[0])
    assert torch.equal(outputs[-1][1], deltas[0])


def sigmoid_roi_head():
    """A RoI head of a yes or no for each class, as of V3Det's detectors."""
    cfg = Config.fromfile(ROOT / "configs/demo/mask-rcnn_swin-demo.py")
    cfg.model.roi_head.bbox_head.loss_cls = dict(type="CrossEntropyCustomLoss", use_sigmoid=True, num_classes=8)
    return MODELS.build(cfg.model)


def test_heads_of_a_yes_or_no_for_each_class():
    """A shift of all logits is nothing to a softmax, and much to them; the last class is one too."""
    model = sigmoid_roi_head()
    assert isinstance(detection_task(model, "detector"), TwoStageTask)
    rois = FixedRois([], None, None, sigmoid=True)
    score = torch.randn(5, CLASSES)
    student, teacher = (dense((4,)), [(score + 3, None)], []), (dense((4,)), [(score, None)], [])
    want = float(dense_loss(student[0], teacher[0])) + sigmoid_kl(score + 3, score)
    assert abs(float(TwoStageTask().loss(student, teacher, rois)) - want) < 1e-5
    score[:, -1] = 9
    assert _foreground(model.roi_head, score).argmax(1).tolist() == [CLASSES - 1] * 5


def test_heads_that_score_more_than_classes_are_not_run():
    cfg = Config.fromfile(ROOT / "configs/demo/mask-rcnn_swin-demo.py")
    cfg.model.roi_head.bbox_head.loss_cls = dict(type="SeesawLoss", num_classes=8)
    model = MODELS.build(cfg.model)
    assert isinstance(detection_task(model), NeckTask)
    with pytest.raises(BadInputError, match=r"not those of this MaskRCNN \(RPNHead, StandardRoIHead, Shared2FC"):
        detection_task(model, "detector")


def test_a_semantic_head_beside_the_others_is_not_run():
    model = sigmoid_roi_head()
    model.semantic_head = torch.nn.Identity()
    assert isinstance(detection_task(model), NeckTask)


@pytest.fixture
def judged():
    """A detector that detects nothing, and the scores by which it has been asked to."""
    scores = []

    def predict(*, cls_scores, **_):
        scores.extend(cls_scores)
        return [[]]

    bbox_head = SimpleNamespace(predict_by_feat=predict, custom_cls_channels=False)
    head = SimpleNamespace(with_mask=True, bbox_head=bbox_head)
    return SimpleNamespace(roi_head=head, test_cfg=SimpleNamespace(rcnn=None)), scores


def test_masks_are_judged_on_the_best_proposals_where_nothing_is_detected(judged):
    boxes = torch.rand(MAX_MASKS + 8, 5)
    logits = torch.zeros(len(boxes), CLASSES + 1)
    logits[:, 1] = torch.linspace(0.1, 4.0, len(boxes))  # the later, the more of class 1
    rois, labels = TwoStageTask()._mask_rois(judged[0], [boxes], [(logits, None)], {})
    assert torch.equal(rois, boxes.flip(0)[:MAX_MASKS])
    assert labels.tolist() == [1] * MAX_MASKS


def test_boxes_for_masks_have_the_mean_score_of_all_stages(judged):
    model, scores = judged
    stages = [(torch.full((4, CLASSES + 1), score), None) for score in (1.0, 2.0, 6.0)]
    TwoStageTask()._mask_rois(model, [torch.rand(4, 5)], stages, {})
    assert len(scores) == 1
    assert torch.equal(scores[0], torch.full((4, CLASSES + 1), 3.0))


def test_the_float_models_rois_say_whether_classes_are_scored_alone():
    model = sigmoid_roi_head().eval()
    meta = dict(img_shape=(64, 64), ori_shape=(64, 64), scale_factor=(1.0, 1.0), img_id=0)
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        rois = TwoStageTask().teacher(model, dict(inputs=image, data_samples=DetDataSample(metainfo=meta)))[1]
    assert rois.sigmoid
