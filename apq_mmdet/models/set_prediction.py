"""Distillation tasks of detectors that predict a set of queries: DETR's descendants and the mask transformers.

Query i of the student is compared with query i of the teacher in every decoder layer. Learned queries correspond as
they are. Two-stage detectors pick theirs among the encoder's proposals, and two models may pick different ones in a
different order; so the student picks what the teacher picked, and the proposals are compared before the choice, at
every position. In DDQ's decoder the suppression of duplicates is fixed in the same way. The masks in which queries of
Mask2Former look are each model's own: they move no query to another place.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from mmcv.ops import batched_nms
from mmdet.models.detectors import ddq_detr
from mmdet.models.detectors.base_detr import DetectionTransformer
from mmdet.models.layers.transformer import ddq_detr_layers
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import hooked
from apq_mmdet.calibration.importance import CalibrationTask
from apq_mmdet.models.losses import bernoulli_gap, bernoulli_kl, categorical_kl, prepare, weighted_mean


class QueryTask(CalibrationTask):
    """Detectors with boxes from queries: class logits, boxes, and the encoder's proposals where there are some.

    Outputs are (logits [L, 1, Q, K], boxes [L, 1, Q, 4], [logits [1, N, K], deltas [1, N, 4]] of proposals or []).
    """

    def teacher(self, model: nn.Module, sample: Any) -> tuple[Any, Any]:
        """Predictions of all decoder layers; the context is what was chosen, index tensors in the order of choices."""
        chosen: list[Tensor] = []

        def note(indices: Tensor) -> Tensor:
            chosen.append(indices)
            return indices

        with selection(note):
            return self._predict(model, sample), chosen

    def student(self, model: nn.Module, sample: Any, context: list[Tensor]) -> Any:
        """The same with the teacher's choices."""
        again = iter(context)
        with selection(lambda _: next(again)):
            return self._predict(model, sample)

    def loss(self, student: Any, teacher: Any, context: Any) -> Tensor:
        """KL of sigmoid scores, and L1 of boxes weighted with the float score of their best class."""
        pairs = [(student[:2], teacher[:2])]
        if teacher[2]:
            pairs.append((student[2], teacher[2]))
        terms = []
        for (logits, boxes), (logits_t, boxes_t) in pairs:
            terms.append(bernoulli_kl(logits, logits_t))
            best = logits_t.sigmoid().amax(-1, keepdim=True)
            terms.append(weighted_mean((boxes - boxes_t).abs(), best))
        return torch.stack(terms).sum()

    def _predict(self, model: DetectionTransformer, sample: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        inputs, data_samples = prepare(model, sample)
        with _proposals(model) as proposals:
            states = model.forward_transformer(model.extract_feat(inputs), data_samples)
        logits, boxes = model.bbox_head(**states)
        return logits, boxes, proposals


@contextlib.contextmanager
def _proposals(model: DetectionTransformer) -> Iterator[list[Tensor]]:
    """Context that gathers the outputs of the branches for encoder proposals, which stand behind the decoder's."""
    found: list[Tensor] = []
    branches = [model.bbox_head.cls_branches, model.bbox_head.reg_branches] if model.as_two_stage else []
    hooks = (
        branch[model.decoder.num_layers].register_forward_hook(lambda *call: found.append(call[-1].clone()))
        for branch in branches
    )
    with hooked(hooks):
        yield found


@contextlib.contextmanager
def selection(choose: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Context in which ``choose`` has the last word on the indices that mmdet's top-k and suppression pick."""
    true_topk = torch.topk

    def topk(x: Tensor, k: int, dim: int = -1) -> tuple[Tensor, Tensor]:
        indices = choose(true_topk(x, k, dim)[1])
        return x.gather(dim, indices), indices

    def nms(boxes: Tensor, scores: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
        kept = choose(batched_nms(boxes, scores, *args)[1])
        return torch.cat([boxes[kept], scores[kept, None]], 1), kept

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "topk", topk))
        for module in (ddq_detr, ddq_detr_layers):
            stack.enter_context(mock.patch.object(module, "batched_nms", nms))
        yield


class MaskTask(CalibrationTask):
    """Mask transformers: class and mask logits of all decoder layers, [1, Q, K + 1] and [1, Q, h, w] each."""

    def student(self, model: nn.Module, sample: Any, context: Any) -> Any:
        """As the teacher."""
        inputs, data_samples = prepare(model, sample)
        logits, masks = model.panoptic_head(model.extract_feat(inputs), data_samples)
        return list(logits), list(masks)

    def loss(self, student: Any, teacher: Any, context: Any) -> Tensor:
        """KL of class scores, and BCE of masks weighted with the float probability that there is an object."""
        terms = []
        for logits, masks, logits_t, masks_t in zip(*student, *teacher, strict=True):
            terms.append(categorical_kl(logits, logits_t))
            object_t = 1 - logits_t.softmax(-1)[..., -1]  # [1, Q]
            terms.append(weighted_mean(bernoulli_gap(masks, masks_t).mean((-2, -1)), object_t))
        return torch.stack(terms).sum()
