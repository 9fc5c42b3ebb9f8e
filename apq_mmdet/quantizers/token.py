"""Affine codes of activations whose range follows each token."""

import torch
from torch import Tensor

from apq_mmdet.quantizers.dynamic import DynamicQuantizer
from apq_mmdet.quantizers.straight_through import straight_through
from apq_mmdet.registry import QUANTIZERS


@QUANTIZERS.register_module(name="token_affine")
class TokenAffineQuantizer(DynamicQuantizer):
    """Unsigned codes of tokens x [..., channels], each on its own affine grid.

    With m_t the middle between the least and the largest value of token t and r_t half of what is between them,
    l_t = m_t - f r_t, s_t = 2 f r_t / (2^k - 1); q_tj = clamp(round((x_tj - l_t) / s_t), 0, 2^k - 1);
    x'_tj = l_t + s_t q_tj.

    This is per-token dynamic quantization, of which integer kernels take the ends of each token while they write its
    codes. Step and offset belong to a row of a matrix product, so they leave it: W x'_t = s_t (W q_t) + l_t (W 1).
    The offset is no code, and zero no value of the grid in general: nothing is padded with zeros behind it.

    A layer takes the mean of each input channel off its input first (``QuantizedLayer.input_centers``), so that a
    token's range is about what sets it apart from other tokens.
    """

    inputs_of = ("Linear",)
    centered = True

    def grid(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Offset l_t and step s_t of each token of ``x`` [..., channels], in its dtype: [..., 1] each."""
        x = x.detach()
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)  # on a CPU aminmax takes five times as long
        step = (high - low).mul_(self.scale.to(x.dtype))
        low = torch.lerp(low, high, 0.5).sub_(step, alpha=self.code_max / 2)
        return low, step.clamp_min_(torch.finfo(x.dtype).tiny)  # a token of equal values

    def encode(self, x: Tensor) -> Tensor:
        """See the base class."""
        low, step = self.grid(x)
        return torch.sub(x, low).div_(step).round_().clamp_(self.code_min, self.code_max).to(torch.int32)

    def decode_on(self, codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
        """Values of codes [..., channels] on given grids, offset and step [..., 1], in their dtype."""
        return codes.to(step.dtype) * step + low

    def fake_quantize(self, x: Tensor) -> Tensor:
        """``decode_on(encode(x), *grid(x))``, equal to the last bit; straight-through gradient."""
        low, step = self.grid(x)
        codes = torch.sub(x.detach(), low).div_(step).round_()
        return straight_through(x, codes, lambda q: q.clamp_(0, self.code_max), lambda q: q.mul_(step).add_(low))
