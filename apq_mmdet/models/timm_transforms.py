"""Rescalings of timm's blocks that keep their float function."""

from timm.layers import Attention, Mlp
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block
from torch import nn

from apq_mmdet.calibration.transforms import RESCALINGS, QueryKeyRescaling, Rescaling, ValueRescaling
from apq_mmdet.models.mmdet_transforms import behind_norm


@RESCALINGS.register(SwinTransformerBlock, Block)
def transformer_block(block: SwinTransformerBlock | Block) -> list[Rescaling]:
    """Behind both norms, between query and key, and between value and projection."""
    if type(block).forward not in (SwinTransformerBlock.forward, Block.forward):
        return []  # a subclass may use what is rescaled elsewhere
    rescalings = _of_attention(block.norm1, block.attn)
    if type(block.mlp).forward is Mlp.forward and isinstance(block.mlp.fc1, nn.Linear):
        rescalings += behind_norm("norm2", block.norm2, block.mlp.fc1)
    return rescalings


def _of_attention(norm: nn.Module, attention: nn.Module) -> list[Rescaling]:
    """Without those that a norm of queries and keys, a norm behind the heads, or a gate forbids."""
    if type(attention) not in (WindowAttention, Attention) and not hasattr(attention, "query_key"):
        return []  # not one that is, or was before it got its product modules
    inner = [getattr(attention, name, None) for name in ("q_norm", "norm", "gate")]
    query_norm, value_norm, gate = (None if isinstance(module, nn.Identity) else module for module in inner)
    # float models have no modules for the two products of attention
    products = [getattr(attention, name, None) for name in ("query_key", "attention_value")]
    rescalings = [] if gate else behind_norm("norm1", norm, attention.qkv)
    if query_norm is None:
        rescalings.append(QueryKeyRescaling("query_key", attention.qkv, products[0]))
    if value_norm is None:
        rescalings.append(ValueRescaling("value_proj", attention.qkv, attention.proj, products[1]))
    return rescalings


@RESCALINGS.register(PatchMerging)
def patch_merging(block: PatchMerging) -> list[Rescaling]:
    """Behind the norm of the merged patches."""
    return behind_norm("norm", block.norm, block.reduction) if type(block).forward is PatchMerging.forward else []
