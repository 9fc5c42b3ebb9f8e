"""timm's Swin, ViT and DeiT: what is an attention and a block of calibration, and how blocks are sampled.

Importing this module makes timm's modules known to ``quantize_model`` and ``calibrate``, with their views, rescalings
and compensations; without it their attention products stay inside timm's fused kernel, in float. ``import_timm`` does
it. timm's linear and convolution layers are torch's own.
"""

from dataclasses import replace

import torch
from timm.layers import (
    Attention,
    AttentionPoolLatent,
    AttentionRope,
    DiffAttention,
    Mlp,
    PatchEmbed,
    maybe_add_mask,
    resolve_self_attn_mask,
)
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer import Block, DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import BlockCall, register_block
from apq_mmdet.calibration.recipe import SearchConfig
from apq_mmdet.calibration.sampling import SAMPLERS
from apq_mmdet.layers import mlp_refit
from apq_mmdet.layers.convert import ATTENTION, FLOAT_REASONS, INLINE
from apq_mmdet.layers.matmul import FloatAttentionValueProduct, FloatQueryKeyProduct
from apq_mmdet.layers.output_compensation import COMPENSATED
from apq_mmdet.models import timm_transforms, timm_views  # noqa: F401  (registered with it)
from apq_mmdet.models.mmdet_layers import position_bias, random_crop

register_block(PatchEmbed, PatchMerging, SwinTransformerBlock, Block)


@COMPENSATED.register(Block)
def _compensated_channels(block: Block) -> int | None:
    qkv = getattr(block.attn, "qkv", None)  # absent from some attention modules
    return None if qkv is None else qkv.in_features


COMPENSATED[SwinTransformerBlock] = lambda block: block.dim


@mlp_refit.MLPS.register(Mlp)
def _mlp(mlp: Mlp) -> mlp_refit.Mlp | None:
    if type(mlp).forward is not Mlp.forward or not isinstance(mlp.norm, nn.Identity):
        return None
    return mlp_refit.Mlp(mlp.fc1, mlp.fc2, mlp, "act") if isinstance(mlp.fc1, nn.Linear) else None


class ProductWindowAttention(WindowAttention):
    """timm's WindowAttention whose two matrix products are modules; same parameters, same float result."""

    query_key: FloatQueryKeyProduct
    attention_value: FloatAttentionValueProduct

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See WindowAttention; x: [B * nW, N, C], mask: [nW, N, N] or None."""
        batch, tokens, _ = x.shape
        query, key, value = _split_heads(self.qkv(x), self.num_heads)  # each [B * nW, H, N, d]
        logits = self.query_key(query * self.scale, key)  # [B * nW, H, N, N]
        logits = logits + position_bias(self.relative_position_bias_table, self.relative_position_index)
        if mask is not None:
            logits = logits.view(-1, len(mask), self.num_heads, tokens, tokens) + mask.unsqueeze(1)
            logits = logits.view(batch, self.num_heads, tokens, tokens)
        attention = self.attn_drop(self.softmax(logits))
        return self.proj_drop(self.proj(_join_heads(self.attention_value(attention, value))))


class ProductAttention(Attention):
    """timm's Attention whose two matrix products are modules; same parameters, same float result."""

    query_key: FloatQueryKeyProduct
    attention_value: FloatAttentionValueProduct

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """See Attention; x: [B, N, C], attn_mask: broadcastable to [B, H, N, N], bool or added to the logits."""
        gate = None if self.gate is None else self.gate(x).sigmoid()  # [B, N, C]
        query, key, value = _split_heads(self.qkv(x), self.num_heads)  # each [B, H, N, d]
        logits = self.query_key(self.q_norm(query) * self.scale, self.k_norm(key))  # [B, H, N, N]
        logits = maybe_add_mask(logits, resolve_self_attn_mask(x.shape[1], logits, attn_mask, is_causal))
        attention = self.attn_drop(logits.softmax(-1))
        x = self.norm(_join_heads(self.attention_value(attention, value)))
        return self.proj_drop(self.proj(x if gate is None else x * gate))


def _split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, ...]:
    """[B, N, 3 H d] -> queries, keys and values, each [B, H, N, d]."""
    batch, tokens, _ = qkv.shape
    return qkv.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _join_heads(x: Tensor) -> Tensor:
    """[B, H, N, d] -> [B, N, H d]."""
    return x.transpose(1, 2).flatten(2)


def _use_product_modules(attention: nn.Module, product_class: type[nn.Module]) -> None:
    attention.__class__ = product_class
    attention.fused_attn = False
    attention.query_key = FloatQueryKeyProduct(attention.num_heads)
    attention.attention_value = FloatAttentionValueProduct(attention.num_heads)


def use_window_product_modules(attention: WindowAttention) -> None:
    """Give a WindowAttention modules for its two products, in place."""
    _use_product_modules(attention, ProductWindowAttention)


def use_product_modules(attention: Attention) -> None:
    """Give an Attention modules for its two products, in place."""
    _use_product_modules(attention, ProductAttention)


class UncalledLinear(nn.Linear):
    """A linear layer whose weight its attention uses without calling it: a quantized one would never see its input."""


def leave_query_key_value_float(attention: nn.Module) -> None:
    """Mark the projection of an attention whose biases of query, key and value lie apart from it."""
    if attention.qkv is not None and attention.q_bias is not None:
        attention.qkv.__class__ = UncalledLinear


WITH_BIASES_APART = (BeitAttention, EvaAttention, WindowAttentionV2)
ATTENTION.update(dict.fromkeys(WITH_BIASES_APART, leave_query_key_value_float))
FLOAT_REASONS["UncalledLinear"] = "its attention uses the weight without calling it"
ATTENTION[WindowAttention] = use_window_product_modules
ATTENTION[Attention] = use_product_modules
OTHERS = (AttentionPoolLatent, AttentionRope, DiffAttention, DiffParallelScalingBlock, ParallelScalingBlock)
INLINE.update(dict.fromkeys((*OTHERS, *WITH_BIASES_APART), "its two products of attention have no modules"))


@SAMPLERS.register(SwinTransformerBlock)
def sample_windows(
    block: SwinTransformerBlock, call: BlockCall, search: SearchConfig, generator: torch.Generator
) -> BlockCall:
    """Sampler of Swin blocks: a random crop of ``search.windows`` x ``search.windows`` whole windows of an image.

    The float output of the crop is computed anew, because shifted windows reach beyond it; padding is never in it. A
    block that masks for one size of images alone is not sampled.
    """
    (x,) = (*call.args, *call.kwargs.values())  # [1, H, W, C]
    sides = [search.windows * size for size in block.window_size]
    whole = all(size <= side for size, side in zip(x.shape[1:3], sides, strict=True))
    if not search.windows or whole or block.attn_mask is not None:
        return call
    rows, columns = (
        random_crop(size, side, step, generator)
        for size, side, step in zip(x.shape[1:3], sides, block.window_size, strict=True)
    )
    cropped = x[:, rows, columns]
    grads = None if call.grads is None else [grad[:, rows, columns] for grad in call.grads]
    return replace(call, args=(cropped,), kwargs={}, outputs=[block(cropped)], grads=grads)
