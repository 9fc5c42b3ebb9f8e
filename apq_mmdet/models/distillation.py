"""Distillation losses of detectors against their own float outputs; no labels are needed.

Two-stage detectors: the RPN (KL of sigmoid objectness, smooth L1 of the deltas where the float objectness exceeds 0.7)
and the RoI heads on the float model's proposals (KL of class scores, L1 of deltas, KL of masks).
Dense one-stage detectors: as the RPN; ATSS and RTMDet with boxes weighted by their float scores. Detectors that predict
sets: see set_prediction.py. Others: their neck's features. Every term is a mean over its elements.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import (
    AnchorHead,
    ATSSHead,
    DDQDETRHead,
    DeformableDETRHead,
    DINOHead,
    Mask2FormerHead,
    MaskFormerHead,
    RetinaHead,
    RPNHead,
    RTMDetHead,
)
from mmdet.models.dense_heads.rtmdet_head import RTMDetSepBNHead
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.detectors.maskformer import MaskFormer
from mmdet.models.detectors.single_stage import SingleStageDetector
from mmdet.models.detectors.two_stage import TwoStageDetector
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead, SABLHead
from mmdet.structures.bbox import bbox2roi, get_box_tensor
from torch import Tensor, nn

from apq_mmdet.calibration.importance import CalibrationTask, feature_loss
from apq_mmdet.errors import BadInputError
from apq_mmdet.models.losses import bernoulli_kl, categorical_kl, prepare, weighted_mean
from apq_mmdet.models.set_prediction import MaskTask, QueryTask

CONFIDENT = 0.7  # float objectness above which a delta matters
MAX_PROPOSALS = 256  # float proposals of an image on which the RoI heads are judged
MAX_MASKS = 32


class FixedRois(NamedTuple):
    """The float model's RoIs: [n, 5] for each bbox stage, [m, 5] for the masks, and each mask's label [m]."""

    bbox: list[Tensor]
    mask: Tensor | None
    mask_labels: Tensor | None
    sigmoid: bool = False  # whether each class has a score of its own, and the background none


def detection_task(model: nn.Module, scope: str = "backbone") -> CalibrationTask:
    """The task that fits a detector; samples are outputs of a test pipeline (dicts of inputs and data_samples).

    Raises:
        BadInputError: scope 'detector', and no task runs the heads of such a detector; or scope 'backbone', and it has
            none of its own.
    """
    if scope == "backbone" and not hasattr(model, "backbone"):
        raise BadInputError(
            f"scope 'backbone': a {type(model).__name__} has no backbone of its own; quantize the detector inside of "
            f"it (of a semi-supervised one its teacher or its student), with that detector's config and weights"
        )
    # exact: subclasses may predict other things
    if isinstance(model, TwoStageDetector) and _has_plain_heads(model):
        return TwoStageTask()
    for detectors, head, heads, task in (
        (SingleStageDetector, "bbox_head", (AnchorHead, RetinaHead), DenseTask),
        (SingleStageDetector, "bbox_head", (ATSSHead, RTMDetHead, RTMDetSepBNHead), WeightedDenseTask),
        (DetectionTransformer, "bbox_head", (DeformableDETRHead, DINOHead, DDQDETRHead), QueryTask),
        (MaskFormer, "panoptic_head", (MaskFormerHead, Mask2FormerHead), MaskTask),
    ):
        if isinstance(model, detectors) and type(getattr(model, head, None)) in heads:
            return task()
    if scope == "detector":
        raise BadInputError(
            f"scope 'detector' knows how to run the heads of two-stage, dense one-stage (RetinaNet, ATSS, RTMDet), "
            f"Deformable-DETR-like and mask-transformer detectors of mmdet, not those of this {_with_heads(model)}; "
            f"use scope 'backbone'"
        )
    return NeckTask()


def _with_heads(model: nn.Module) -> str:
    """A detector's class, and those of its heads."""
    roi = getattr(model, "roi_head", None)
    heads = [getattr(model, name, None) for name in ("rpn_head", "bbox_head", "panoptic_head", "semantic_head")]
    known = dict.fromkeys(type(head).__name__ for head in (*heads, roi, *_box_heads(roi)) if head is not None)
    return f"{type(model).__name__} ({', '.join(known)})"


def _has_plain_heads(model: TwoStageDetector) -> bool:
    heads = type(getattr(model, "rpn_head", None)), type(getattr(model, "roi_head", None))
    if heads not in ((RPNHead, StandardRoIHead), (RPNHead, CascadeRoIHead)) or hasattr(model, "semantic_head"):
        return False
    boxes = _box_heads(model.roi_head)
    if not all(isinstance(head, BBoxHead) and not isinstance(head, SABLHead) for head in boxes):  # SABL's has buckets
        return False
    # Seesaw's scores of objectness are no class
    return _has_sigmoid(model.roi_head) or not any(head.custom_cls_channels for head in boxes)


def dense_loss(student: tuple, teacher: tuple) -> Tensor:
    """KL of sigmoid scores and smooth L1 of confident deltas, summed over levels.

    Args:
        student, teacher: (scores, deltas), each a list over levels of [1, A * K, H, W] and [1, A * 4, H, W].
    """
    terms = []
    for score, delta, score_t, delta_t in zip(*student[:2], *teacher[:2], strict=True):
        terms.append(bernoulli_kl(score, score_t))
        anchors = delta_t.shape[1] // 4
        best = score_t.sigmoid().unflatten(1, (anchors, -1)).amax(2, keepdim=True)  # [1, A, 1, H, W]
        weight = (best > CONFIDENT).to(delta).expand(-1, -1, 4, -1, -1)
        error = F.smooth_l1_loss(delta, delta_t, reduction="none").unflatten(1, (anchors, 4))
        terms.append((error * weight).sum() / weight.sum().clamp_min(1))
    return torch.stack(terms).sum()


class DenseTask(CalibrationTask):
    """One-stage detectors with an anchor head."""

    def student(self, model: nn.Module, sample: Any, context: Any) -> Any:
        """As the teacher."""
        inputs, _ = prepare(model, sample)
        return model.bbox_head(model.extract_feat(inputs))

    def loss(self, student: Any, teacher: Any, context: Any) -> Tensor:
        """See the module's docstring."""
        return dense_loss(student, teacher)


class WeightedDenseTask(DenseTask):
    """One-stage detectors whose boxes are distances or deltas of any scale, with or without a centerness."""

    def loss(self, student: Any, teacher: Any, context: Any) -> Tensor:
        """KL of sigmoid scores and centerness; L1 of boxes relative to their size, weighted with float scores."""
        terms = []
        for level in zip(*student, *teacher, strict=True):  # scores, boxes, centerness; [1, A * K, H, W] and so on
            (score, box, *center), (score_t, box_t, *center_t) = level[: len(student)], level[len(student) :]
            best = score_t.sigmoid().unflatten(1, (box_t.shape[1] // 4, -1)).amax(2, keepdim=True)  # [1, A, 1, H, W]
            gap, size = ((t.abs().unflatten(1, (-1, 4))) for t in (box - box_t, box_t))
            terms.append(weighted_mean(gap, best) / weighted_mean(size, best).clamp_min(1e-12))
            terms += [bernoulli_kl(s, t) for s, t in zip((score, *center), (score_t, *center_t), strict=True)]
        return torch.stack(terms).sum()


class NeckTask(CalibrationTask):
    """Any other detector, by the features that its heads receive; the heads themselves are not run."""

    def student(self, model: nn.Module, sample: Any, context: Any) -> Any:
        """As the teacher."""
        return model.extract_feat(prepare(model, sample)[0])

    def loss(self, student: Any, teacher: Any, context: Any) -> Tensor:
        """Relative squared error of the features."""
        return feature_loss(student, teacher)


class TwoStageTask(CalibrationTask):
    """Two-stage and cascade detectors, with or without masks."""

    def teacher(self, model: nn.Module, sample: Any) -> tuple[Any, Any]:
        """RPN and RoI outputs on the model's own best proposals."""
        inputs, data_samples = prepare(model, sample)
        metas = [s.metainfo for s in data_samples]
        features = model.extract_feat(inputs)
        rpn = model.rpn_head(features)
        proposals = model.rpn_head.predict_by_feat(*rpn, batch_img_metas=metas, cfg=model.test_cfg.rpn)[0]
        rois = bbox2roi([get_box_tensor(proposals.bboxes)[:MAX_PROPOSALS]])
        stages, boxes = self._run_teacher_stages(model.roi_head, features, rois, metas[0])
        mask_rois, labels = self._mask_rois(model, boxes, stages, metas[0])
        fixed = FixedRois(boxes, mask_rois, labels, _has_sigmoid(model.roi_head))
        masks = self._masks(model.roi_head, features, fixed)
        return (rpn, stages, masks), fixed

    def student(self, model: nn.Module, sample: Any, context: FixedRois) -> Any:
        """The same outputs on the teacher's RoIs."""
        inputs, _ = prepare(model, sample)
        features = model.extract_feat(inputs)
        rpn = model.rpn_head(features)
        head = model.roi_head
        stages = [self._bbox(head, i, features, rois) for i, rois in enumerate(context.bbox)]
        return rpn, stages, self._masks(head, features, context)

    def loss(self, student: Any, teacher: Any, context: FixedRois) -> Tensor:
        """See the module's docstring."""
        terms = [dense_loss(student[0], teacher[0])]
        for (score, delta), (score_t, delta_t) in zip(student[1], teacher[1], strict=True):
            if score.numel():
                terms.append((bernoulli_kl if context.sigmoid else categorical_kl)(score, score_t))
            if delta is not None and delta.numel():
                terms.append(F.l1_loss(delta, delta_t))
        for mask, mask_t in zip(student[2], teacher[2], strict=True):
            if mask.numel():
                terms.append(bernoulli_kl(*(_of_label(m, context.mask_labels) for m in (mask, mask_t))))
        return torch.stack(terms).sum()

    def _run_teacher_stages(
        self, head: StandardRoIHead | CascadeRoIHead, features: tuple, rois: Tensor, meta: dict
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
        number = head.num_stages if isinstance(head, CascadeRoIHead) else 1
        outputs, boxes = [], [rois]
        for stage in range(number):
            outputs.append(self._bbox(head, stage, features, boxes[-1]))
            if stage + 1 < number:
                score, delta = outputs[-1]
                label = _foreground(head, score).argmax(1)
                refined = head.bbox_head[stage].regress_by_class(boxes[-1][:, 1:], label, delta, meta)
                boxes.append(torch.cat([boxes[-1][:, :1], get_box_tensor(refined)], 1))
        return outputs, boxes

    def _mask_rois(
        self, model: nn.Module, boxes: list[Tensor], stages: list, meta: dict
    ) -> tuple[Tensor | None, Tensor | None]:
        """Boxes of the float detections; the proposals of highest class score where nothing is detected."""
        head = model.roi_head
        if not head.with_mask:
            return None, None
        score = torch.stack([s for s, _ in stages]).mean(0)  # [n, K + 1], as the cascade averages its stages
        bbox_head = head.bbox_head[-1] if isinstance(head, CascadeRoIHead) else head.bbox_head
        found = bbox_head.predict_by_feat(
            rois=(boxes[-1],),
            cls_scores=(score,),
            bbox_preds=(stages[-1][1],),
            batch_img_metas=[meta],
            rcnn_test_cfg=model.test_cfg.rcnn,
        )[0]
        if len(found):
            return bbox2roi([get_box_tensor(found.bboxes)[:MAX_MASKS]]), found.labels[:MAX_MASKS]
        foreground, label = _foreground(head, score).max(1)
        order = foreground.argsort(descending=True, stable=True)[:MAX_MASKS]
        return boxes[-1][order], label[order]

    @staticmethod
    def _bbox(head: Any, stage: int, features: tuple, rois: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(head, CascadeRoIHead):
            result = head._bbox_forward(stage, features, rois)
        else:
            result = head._bbox_forward(features, rois)
        return result["cls_score"], result["bbox_pred"]

    @staticmethod
    def _masks(head: Any, features: tuple, fixed: FixedRois) -> list[Tensor]:
        if fixed.mask is None:
            return []
        if isinstance(head, CascadeRoIHead):
            return [head._mask_forward(s, features, fixed.mask)["mask_preds"] for s in range(head.num_stages)]
        return [head._mask_forward(features, fixed.mask)["mask_preds"]]


def _box_heads(head: nn.Module) -> list[nn.Module]:
    boxes = getattr(head, "bbox_head", None)
    return list(boxes) if isinstance(boxes, nn.ModuleList) else [boxes]


def _has_sigmoid(head: nn.Module) -> bool:
    """Whether the box heads have a yes or no for each class and no background, as V3Det's."""
    return all(box.custom_cls_channels and getattr(box.loss_cls, "use_sigmoid", False) for box in _box_heads(head))


def _foreground(head: nn.Module, score: Tensor) -> Tensor:
    """Probabilities of the classes [n, K] from the scores of a box head."""
    return score.sigmoid() if _has_sigmoid(head) else score.softmax(1)[:, :-1]


def _of_label(masks: Tensor, labels: Tensor) -> Tensor:
    """[m, K, h, w] -> [m, h, w], each RoI's map of its label; K is 1 for class-agnostic heads."""
    if masks.shape[1] == 1:
        return masks[:, 0]
    return masks[torch.arange(len(masks), device=masks.device), labels]
