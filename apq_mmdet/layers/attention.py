"""torch's multi-head attention with its projections and products as modules, so that they can be quantized."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apq_mmdet.layers.convert import ATTENTION
from apq_mmdet.layers.matmul import FloatAttentionValueProduct, FloatQueryKeyProduct

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class ProductMultiheadAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose three input projections and two products are modules; same float result.

    The projections are layers of their own, because queries, keys and values have ranges of their own. In a
    state_dict their parameters keep the names that torch gives them, ``in_proj_weight`` and so on.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    query_key: FloatQueryKeyProduct
    attention_value: FloatAttentionValueProduct

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As ``nn.MultiheadAttention.forward``.

        Args:
            query, key, value: [L, B, E], [S, B, kdim] and [S, B, vdim]; with ``batch_first`` [B, L, E] and so on;
                without a batch [L, E] and so on.
            key_padding_mask: [B, S] or [S]; bool (True: no such key), or float, which is added to the logits.
            attn_mask: [L, S] or [B * H, L, S], bool or float alike.
            is_causal: says that ``attn_mask`` is causal, nothing else.

        Returns:
            The output in the shape of the query, and the attention map: [B, L, S], or with ``average_attn_weights``
            switched off [B, H, L, S], both without B where there is no batch; or None.

        Raises:
            RuntimeError: ``is_causal`` without a mask.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal needs an attn_mask")
        batched = query.dim() == 3
        axis = 0 if self.batch_first or not batched else 1  # of the batch
        query, key, value = (x if batched else x.unsqueeze(0) for x in (query, key, value))
        mask = self._mask(attn_mask, key_padding_mask, query, axis)
        q, k, v = (
            self._heads(project(x), axis)  # [B, H, N, d]
            for project, x in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        logits = self.query_key(q / math.sqrt(self.head_dim), k)  # [B, H, L, S]
        attention = (logits if mask is None else logits + mask).softmax(-1)
        attention = F.dropout(attention, self.dropout, self.training)
        output = self.attention_value(attention, v).movedim(1, 2).flatten(2)  # [B, L, E]
        output = self.out_proj(output if axis == 0 else output.transpose(0, 1))
        weights = None
        if need_weights:
            weights = attention.mean(1) if average_attn_weights else attention
        if batched:
            return output, weights
        return output[0], weights if weights is None else weights[0]

    def _heads(self, x: Tensor, axis: int) -> Tensor:
        """[B, N, E], or [N, B, E] where the batch is axis 1, to [B, H, N, d]."""
        x = x if axis == 0 else x.transpose(0, 1)
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(
        self, attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor, axis: int
    ) -> Tensor | None:
        """What both masks add to the logits, broadcast to [B, H, L, S]."""
        terms = []
        if attn_mask is not None:
            per_head = attn_mask.dim() == 3
            terms.append(attn_mask.unflatten(0, (query.shape[axis], self.num_heads)) if per_head else attn_mask)
        if key_padding_mask is not None:
            terms.append(key_padding_mask.view(-1, 1, 1, key_padding_mask.shape[-1]))
        terms = [_additive(term, query.dtype) for term in terms]
        return sum(terms[1:], terms[0]) if terms else None

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Takes the projections by torch's names as well as by their own."""
        self.split_projections(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @staticmethod
    def split_projections(state: dict[str, Tensor], prefix: str) -> None:
        """Rename torch's parameters of the projections to those of their modules, in place."""
        for part in ("weight", "bias"):
            whole = state.pop(f"{prefix}in_proj_{part}", None)
            if whole is not None:
                names = (f"{prefix}{name}.{part}" for name in PROJECTIONS)
                state.update(zip(names, whole.tensor_split(3), strict=True))
        for name in PROJECTIONS:  # of embeddings of different sizes
            if f"{prefix}{name}_weight" in state:
                state[f"{prefix}{name}.weight"] = state.pop(f"{prefix}{name}_weight")


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(mask.bool(), -torch.inf)


def use_projection_and_product_modules(attention: nn.MultiheadAttention) -> None:
    """Give a nn.MultiheadAttention modules for its projections and products, in place.

    One with learned or zero keys (``add_bias_kv``, ``add_zero_attn``) stays as it is.
    """
    if attention.bias_k is not None or attention.add_zero_attn:
        return
    state = {key: value.detach() for key, value in attention._parameters.items() if value is not None}
    like = attention.out_proj.weight
    for name, size in zip(PROJECTIONS, (attention.embed_dim, attention.kdim, attention.vdim), strict=True):
        bias = attention.in_proj_bias is not None
        layer = nn.Linear(size, attention.embed_dim, bias, like.device, like.dtype)
        attention.add_module(name, layer.requires_grad_(like.requires_grad))
    for name in list(attention._parameters):
        attention.register_parameter(name, None)
    attention.query_key = FloatQueryKeyProduct(attention.num_heads)
    attention.attention_value = FloatAttentionValueProduct(attention.num_heads)
    attention.out_proj.__class__ = nn.Linear  # from here on it is called
    attention.__class__ = ProductMultiheadAttention
    attention._register_state_dict_hook(_merge_projections)
    attention.load_state_dict(state, strict=False)


def _merge_projections(
    attention: ProductMultiheadAttention, state: dict[str, Tensor], prefix: str, _: dict[str, Any]
) -> None:
    """The way back, for state_dict()."""
    for part in ("weight", "bias"):
        parts = [state.pop(f"{prefix}{name}.{part}", None) for name in PROJECTIONS]
        if parts[0] is None:
            continue
        if part == "bias" or attention._qkv_same_embed_dim:
            state[f"{prefix}in_proj_{part}"] = torch.cat(parts)
        else:
            state.update(zip((f"{prefix}{name}_weight" for name in PROJECTIONS), parts, strict=True))


def keep_tensors_whole(encoder: nn.TransformerEncoder) -> None:
    """Let an encoder never pack padded sequences into nested tensors, which its fused kernel alone understands."""
    encoder.use_nested_tensor = False


ATTENTION[nn.MultiheadAttention] = use_projection_and_product_modules
ATTENTION[nn.TransformerEncoder] = keep_tensors_whole
