"""Blocks of mmdet whose output can be compensated: those that map tokens [..., C] to tokens of the same shape."""

from mmdet.models.backbones.swin import SwinBlock

from apq_mmdet.layers.output_compensation import COMPENSATED

COMPENSATED[SwinBlock] = lambda block: block.attn.w_msa.embed_dims
