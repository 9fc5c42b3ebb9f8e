"""Blocks of timm whose output can be compensated: those that map tokens [..., C] to tokens of the same shape."""

from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.vision_transformer import Block

from apq_mmdet.layers.output_compensation import COMPENSATED


def _channels(block: Block) -> int | None:
    qkv = getattr(block.attn, "qkv", None)  # absent from some attention modules
    return None if qkv is None else qkv.in_features


COMPENSATED[SwinTransformerBlock] = lambda block: block.dim
COMPENSATED[Block] = _channels
