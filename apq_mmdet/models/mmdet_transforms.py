"""Rescalings of mmdet's blocks that keep their float function."""

from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock, WindowMSA
from mmdet.models.layers import PatchMerging
from torch import nn

from apq_mmdet.calibration.transforms import (
    RESCALINGS,
    NormRescaling,
    QueryKeyRescaling,
    Rescaling,
    ValueRescaling,
)
from apq_mmdet.models.mmdet_layers import ProductWindowMSA


@RESCALINGS.register(SwinBlock)
def swin_block(block: SwinBlock) -> list[Rescaling]:
    """Behind both norms, between query and key, and between value and projection."""
    if type(block).forward is not SwinBlock.forward or type(block.attn).forward is not ShiftWindowMSA.forward:
        return []  # a subclass may use what is rescaled elsewhere
    attention, rescalings = block.attn.w_msa, []
    if type(attention).forward in (WindowMSA.forward, ProductWindowMSA.forward):
        # float models have no modules for the two products of attention
        products = [getattr(attention, name, None) for name in ("query_key", "attention_value")]
        rescalings = [
            *behind_norm("norm1", block.norm1, attention.qkv),
            QueryKeyRescaling("query_key", attention.qkv, products[0]),
            ValueRescaling("value_proj", attention.qkv, attention.proj, products[1]),
        ]
    if type(block.ffn).forward is FFN.forward:
        rescalings += behind_norm("norm2", block.norm2, block.ffn.layers[0][0])
    return rescalings


@RESCALINGS.register(PatchMerging)
def patch_merging(block: PatchMerging) -> list[Rescaling]:
    """Behind the norm of the merged patches."""
    return behind_norm("norm", block.norm, block.reduction) if type(block).forward is PatchMerging.forward else []


def behind_norm(name: str, norm: nn.Module | None, linear: nn.Linear) -> list[Rescaling]:
    """The rescaling of a LayerNorm and the layer behind it; none for other norms, and for those without gamma."""
    affine = isinstance(norm, nn.LayerNorm) and norm.weight is not None
    return [NormRescaling(name, norm, linear)] if affine else []
