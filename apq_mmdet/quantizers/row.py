"""Affine codes of softmax outputs whose steps follow each row, and whose rows still sum to one."""

import torch
from torch import Tensor

from apq_mmdet.quantizers.dynamic import DynamicQuantizer
from apq_mmdet.quantizers.straight_through import straight_through
from apq_mmdet.registry import QUANTIZERS


@QUANTIZERS.register_module(name="row_affine")
class RowAffineQuantizer(DynamicQuantizer):
    """Unsigned codes with zero point 0 of attention maps A [..., N, M], the last axis a softmax that sums to one.

    s_i = f max_j A_ij / (2^k - 1); q_ij = clamp(round(A_ij / s_i), 0, 2^k - 1);
    A'_ij = s_i q_ij + (1 - s_i sum_j q_ij) / M.

    The largest probability of a row is the reciprocal of the sum of exponentials that a softmax divides by. So codes
    of A are codes of its numerators exp(x_ij - max_j x_ij), which never exceed 1, on a step that is known beforehand:
    what integer attention kernels multiply. What rounding takes from a row, mostly from its many small probabilities,
    goes to all of its entries alike. In a product with values that is a rank-one term, A' v = s_i (q v) + r_i mean(v),
    with r_i from the integer row sums of q. Masked entries take part in it: their share of a row's rest is not zero.
    """

    lowest = 0.0
    source = "softmax outputs"
    roles = ("attention",)
    grouped = True

    def row_steps(self, x: Tensor) -> Tensor:
        """The step s_i of each row of ``x`` [..., N, M], in the dtype of ``x``: [..., N, 1]."""
        steps = self.per_element(self.scale, x).to(x.dtype) * x.detach().amax(-1, keepdim=True)
        return steps.clamp_min(torch.finfo(x.dtype).tiny)  # a row of zeros

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        return torch.div(x, self.row_steps(x)).round_().clamp_(self.code_min, self.code_max).to(torch.int32)

    def decode_on(self, codes: Tensor, steps: Tensor) -> Tensor:
        """Values of codes [..., N, M] in rows of given steps [..., N, 1], in the dtype of the steps."""
        return _with_unit_sum(codes.to(steps.dtype) * steps)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``decode_on(encode(x), row_steps(x))``, equal to the last bit; straight-through gradient."""
        steps = self.row_steps(x)
        codes = torch.div(x.detach(), steps).round_()
        return _with_unit_sum(straight_through(x, codes, lambda q: q.clamp_(0, self.code_max), lambda q: q.mul_(steps)))


def _with_unit_sum(x: Tensor) -> Tensor:
    """Rows [..., M] to which what they lack to a sum of one is added, the same to each entry."""
    return x + (1 - x.sum(-1, keepdim=True)) / x.shape[-1]
