"""Parts of the distillation losses: how far predictions are from those of the float model."""

from typing import Any

import torch.nn.functional as F
from mmdet.models.detectors.base import BaseDetector
from mmengine.dataset import pseudo_collate
from torch import Tensor


def prepare(model: BaseDetector, sample: dict[str, Any]) -> tuple[Tensor, list[Any]]:
    """A sample of the test pipeline as the model takes it: images [1, 3, H, W] and one DetDataSample."""
    data = model.data_preprocessor(pseudo_collate([sample]), False)
    return data["inputs"], data["data_samples"]


def bernoulli_kl(logits: Tensor, logits_t: Tensor) -> Tensor:
    """Mean KL(teacher || student) of independent Bernoulli variables given by their logits."""
    return bernoulli_gap(logits, logits_t).mean()


def bernoulli_gap(logits: Tensor, logits_t: Tensor) -> Tensor:
    """KL(teacher || student) of each of independent Bernoulli variables given by their logits."""
    return F.softplus(logits) - F.softplus(logits_t) - logits_t.sigmoid() * (logits - logits_t)


def categorical_kl(logits: Tensor, logits_t: Tensor) -> Tensor:
    """Mean KL(teacher || student) of distributions over the last axis given by their logits."""
    target = logits_t.log_softmax(-1).flatten(0, -2)
    return F.kl_div(logits.log_softmax(-1).flatten(0, -2), target, reduction="batchmean", log_target=True)


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean over all axes with weights that broadcast against the values; 0 where all weights are 0."""
    weights = weights.expand_as(values)
    return (values * weights).sum() / weights.sum().clamp_min(1e-12)
