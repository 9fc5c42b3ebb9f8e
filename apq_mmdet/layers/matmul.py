"""The two matrix products of attention as modules, so that their operands can be quantized."""

from torch import Tensor, nn

from apq_mmdet.layers.base import QuantizedLayer, register_layer


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


@register_layer(FloatQueryKeyProduct)
class QueryKeyProduct(_QuantizedProduct, FloatQueryKeyProduct):
    """``Q(q) Q(k)^T``."""

    roles = ("query", "key")

    def forward(self, query: Tensor, key: Tensor) -> Tensor:
        """Attention logits of quantized queries and keys."""
        return super().forward(self.quantize("query", query), self.quantize("key", key))


@register_layer(FloatAttentionValueProduct)
class AttentionValueProduct(_QuantizedProduct, FloatAttentionValueProduct):
    """``Q(A) Q(v)``."""

    roles = ("attention", "value")

    def forward(self, attention: Tensor, value: Tensor) -> Tensor:
        """Weighted sum of quantized values by a quantized attention map."""
        return super().forward(self.quantize("attention", attention), self.quantize("value", value))
