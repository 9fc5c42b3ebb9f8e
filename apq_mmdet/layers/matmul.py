"""The two matrix products of attention as modules, so that their operands can be quantized."""

from torch import Tensor, nn

from apq_mmdet.layers.base import QuantizedLayer, register_layer
from apq_mmdet.layers.integer import integer_precision, rescale


class Product(nn.Module):
    """A batched matrix product over ``heads`` attention heads.

    Args:
        heads: number of heads H, on axis 1 of both operands.
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def extra_repr(self) -> str:
        return f"heads={self.heads}"


class FloatQueryKeyProduct(Product):
    """``q k^T``; q: [B, H, L, d], k: [B, H, S, d] -> [B, H, L, S]."""

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Attention logits."""
        return query @ key.transpose(-2, -1)


class FloatAttentionValueProduct(Product):
    """``A v``; A: [B, H, L, S], v: [B, H, S, d] -> [B, H, L, d]."""

    def forward(self, attention: Tensor, value: Tensor) -> Tensor:
        """Weighted sum of the values."""
        return attention @ value


class _QuantizedProduct(QuantizedLayer):
    kind = "MatMul"
    heads: int

    def role_axis(self, role: str) -> tuple[int, int]:
        """Heads are the axis that finer granularities cut."""
        return 1, self.heads

    @property
    def may_take_codes(self) -> bool:
        """See the base class. How deep a product is each call tells; where it is too deep, values are multiplied."""
        return self.has_linear_codes

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """The product of the operands, quantized by the two roles."""
        operands = [self.quantize(role, x) for role, x in zip(self.roles, (left, right), strict=True)]
        if not self.takes_codes:
            return super().forward(*operands)
        quantizers = [self.quantizers[role] for role in self.roles]
        scales = [q.per_element(q.scale, x) for q, x in zip(quantizers, operands, strict=True)]  # [1] or [1, H, 1, 1]
        if not self.sums_exactly(left.shape[-1]):
            return super().forward(*(codes * scale for codes, scale in zip(operands, scales, strict=True)))
        with integer_precision():
            product = super().forward(*operands)
        return rescale(product, scales[0] * scales[1], None)


@register_layer(FloatQueryKeyProduct)
class QueryKeyProduct(_QuantizedProduct, FloatQueryKeyProduct):
    """``Q(q) Q(k)^T``: attention logits of quantized queries and keys."""

    roles = ("query", "key")


@register_layer(FloatAttentionValueProduct)
class AttentionValueProduct(_QuantizedProduct, FloatAttentionValueProduct):
    """``Q(A) Q(v)``: weighted sum of quantized values by a quantized attention map."""

    roles = ("attention", "value")
