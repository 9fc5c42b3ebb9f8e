"""mmdet's and mmcv's modules: which of them are layers, attention, or a block of calibration."""

from dataclasses import replace

import mmcv.cnn
import torch
from mmcv.cnn.bricks.transformer import FFN
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.backbones.swin import SwinBlock, WindowMSA
from mmdet.models.dense_heads import DDQDETRHead, Mask2FormerHead, MaskFormerHead
from mmdet.models.dense_heads.anchor_head import AnchorHead
from mmdet.models.layers import MLP, CSPLayer, PatchEmbed, PatchMerging
from mmdet.models.layers.transformer import DetrTransformerDecoderLayer, DetrTransformerEncoderLayer
from mmdet.models.necks import FPN
from mmdet.models.necks.dyhead import DyHeadBlock
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor

from apq_mmdet.calibration.blocks import BlockCall, register_block
from apq_mmdet.calibration.recipe import SearchConfig
from apq_mmdet.calibration.sampling import SAMPLERS, sample_rows
from apq_mmdet.layers.base import register_layer
from apq_mmdet.layers.conv import QuantizedConv2d, QuantizedConvTranspose2d
from apq_mmdet.layers.convert import ATTENTION, INLINE, TRAINING_ONLY
from apq_mmdet.layers.linear import QuantizedLinear
from apq_mmdet.layers.matmul import FloatAttentionValueProduct, FloatQueryKeyProduct
from apq_mmdet.layers.mlp_refit import MLPS, Mlp
from apq_mmdet.layers.output_compensation import COMPENSATED

register_layer(mmcv.cnn.Linear)(QuantizedLinear)
register_layer(mmcv.cnn.Conv2d)(QuantizedConv2d)
register_layer(mmcv.cnn.ConvTranspose2d)(QuantizedConvTranspose2d)

register_block(PatchEmbed, PatchMerging, SwinBlock, FPN, AnchorHead, BBoxHead, FCNMaskHead)
register_block(DetrTransformerEncoderLayer, DetrTransformerDecoderLayer, MLP, CSPLayer, DyHeadBlock)
SAMPLERS.register(BBoxHead, FCNMaskHead)(sample_rows)
COMPENSATED[SwinBlock] = lambda block: block.attn.w_msa.embed_dims


@MLPS.register(FFN)
def _mlp(ffn: FFN) -> Mlp | None:
    if type(ffn).forward is not FFN.forward or ffn.num_fcs != 2:
        return None
    return Mlp(ffn.layers[0][0], ffn.layers[1], ffn.layers[0], "1")


@SAMPLERS.register(SwinBlock)
def sample_windows(block: SwinBlock, call: BlockCall, search: SearchConfig, generator: torch.Generator) -> BlockCall:
    """Sampler of Swin blocks: a random crop of ``search.windows`` x ``search.windows`` whole windows of an image.

    The float output of the crop is computed anew, because shifted windows reach beyond it; padding is never in it.
    """
    side = search.windows * block.attn.window_size
    names = ("x", "hw_shape")
    x, (height, width) = (*call.args, *(call.kwargs[n] for n in names[len(call.args) :]))  # x: [B, H * W, C]
    if not search.windows or (height <= side and width <= side):
        return call
    rows, columns = (random_crop(size, side, block.attn.window_size, generator) for size in (height, width))

    def crop(tokens: Tensor) -> Tensor:
        grid = tokens.view(len(tokens), height, width, -1)[:, rows, columns]  # [B, h, w, C]
        return grid.flatten(1, 2)

    shape = (min(side, height), min(side, width))
    cropped = crop(x)
    return replace(
        call,
        args=(cropped, shape),
        kwargs={},
        outputs=[block(cropped, shape)],
        grads=None if call.grads is None else [crop(grad) for grad in call.grads],
    )


def random_crop(size: int, side: int, step: int, generator: torch.Generator) -> slice:
    """A random range of ``side`` positions out of ``size``, starting at a multiple of ``step``."""
    if size <= side:
        return slice(0, size)
    start = step * int(torch.randint((size - side) // step + 1, (), generator=generator))
    return slice(start, start + side)


class ProductWindowMSA(WindowMSA):
    """mmdet's WindowMSA whose two inline matrix products are modules; same parameters, same float result."""

    query_key: FloatQueryKeyProduct
    attention_value: FloatAttentionValueProduct

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """See WindowMSA; x: [nW * B, N, C], mask: [nW, N, N] or None."""
        batch, tokens, channels = x.shape
        bias = position_bias(self.relative_position_bias_table, self.relative_position_index)  # [1, H, N, N]
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [nW * B, H, N, d]
        logits = self.query_key(query * self.scale, key) + bias  # [nW * B, H, N, N]
        if mask is not None:
            windows = mask.shape[0]
            logits = logits.view(batch // windows, windows, self.num_heads, tokens, tokens)
            logits = (logits + mask[None, :, None]).view(-1, self.num_heads, tokens, tokens)
        attention = self.attn_drop(self.softmax(logits))
        x = self.attention_value(attention, value).transpose(1, 2).reshape(batch, tokens, channels)
        return self.proj_drop(self.proj(x))


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """Relative position bias; table: [(2 w - 1)^2, H], index: [N, N]; returns [1, H, N, N]."""
    bias = table[index.view(-1)]  # [N * N, H]
    return bias.view(*index.shape, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def use_product_modules(attention: WindowMSA) -> None:
    """Give a WindowMSA modules for its two products, in place."""
    attention.__class__ = ProductWindowMSA
    attention.query_key = FloatQueryKeyProduct(attention.num_heads)
    attention.attention_value = FloatAttentionValueProduct(attention.num_heads)


ATTENTION[WindowMSA] = use_product_modules

INLINE[MultiScaleDeformableAttention] = "weighs sampled values: no matrix product"
for head in (MaskFormerHead, Mask2FormerHead):
    INLINE[head] = "the product of query embeddings and mask features has no module"

# heads of the dense queries that help in training, and their share of the encoder's proposals
TRAINING_ONLY[DDQDETRHead] = lambda head: [
    head.cls_branches[-1],
    head.reg_branches[-1],
    head.aux_cls_branches,
    head.aux_reg_branches,
]
