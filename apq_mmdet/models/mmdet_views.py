"""Views of mmdet's blocks as independent units: windows of Swin blocks, patches of embeddings, RoIs of heads."""

import inspect
from collections.abc import Callable

import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock
from mmdet.models.layers import PatchEmbed, PatchMerging
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import BlockCall
from apq_mmdet.calibration.units import View, register_view
from apq_mmdet.layers.base import needs_whole_input

SEPARATED = -100.0  # what mmdet adds to the logits of tokens that a shifted window must keep apart


@register_view(SwinBlock)
def windows(block: SwinBlock, call: BlockCall) -> View | None:
    """Windows of N tokens, padded, shifted and partitioned as ShiftWindowMSA does."""
    if not (_runs(block, SwinBlock) and _runs(block.attn, ShiftWindowMSA)):
        return None
    names = ("x", "hw_shape")
    x, (height, width) = (*call.args, *(call.kwargs[n] for n in names[len(call.args) :]))  # x: [1, H * W, C]
    if len(x) != 1:
        return None
    token, region = window_layout(block.attn, height, width)
    token = token.to(x.device)
    padded = token == 0  # [n, N]

    def to_windows(t: Tensor) -> Tensor:
        return F.pad(t[0], (0, 0, 1, 0))[token]  # [n, N, C], zero where padded

    any_padded = bool(padded.any())
    valid = ~padded if any_padded else None
    args = (to_windows(x), None if region is None else region.to(x.device), valid)
    padding = padded.sum(1) * x.shape[-1] if any_padded else None
    return View(WindowBlock(block), args, to_windows, padding)


def window_layout(attention: ShiftWindowMSA, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Which token stands where in which window.

    Returns:
        Index + 1 of each window's tokens, 0 for padding, int64 [n, N]; and the regions that a shifted window must
        keep apart, int64 [n, N], or None without shift.
    """
    size, shift = attention.window_size, attention.shift_size
    rows, columns = height + -height % size, width + -width % size
    grid = F.pad(
        torch.arange(1, height * width + 1).view(1, height, width, 1), (0, 0, 0, columns - width, 0, rows - height)
    )
    if shift == 0:
        return attention.window_partition(grid).view(-1, size * size), None
    token = attention.window_partition(grid.roll((-shift, -shift), (1, 2))).view(-1, size * size)
    bands = [
        (torch.arange(n) >= n - size).long() + (torch.arange(n) >= n - shift).long() for n in (rows, columns)
    ]  # 0, 1, 2 along each side, after the shift
    region = (3 * bands[0][:, None] + bands[1][None]).view(1, rows, columns, 1)
    return token, attention.window_partition(region).view(-1, size * size)


class WindowBlock(nn.Module):
    """A SwinBlock on windows that are already cut; shares the block's modules and their names."""

    def __init__(self, block: SwinBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.ffn = block.norm1, block.attn, block.norm2, block.ffn

    def forward(self, x: Tensor, region: Tensor | None, valid: Tensor | None) -> Tensor:
        """x: [n, N, C], zero where padded; region: [n, N] or None; valid: bool [n, N] or None; returns [n, N, C]."""
        y = self.norm1(x)
        if valid is not None:
            y = y * valid.unsqueeze(-1)  # mmdet pads after the norm
        mask = None if region is None else region_mask(region)
        x = self.attn.drop(self.attn.w_msa(y, mask)) + x
        return self._ffn(x) if valid is None else on_valid_tokens(self._ffn, x, valid)

    def _ffn(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return self.ffn(self.norm2(x), identity=x)


def on_valid_tokens(function: Callable[[Tensor], Tensor], x: Tensor, valid: Tensor) -> Tensor:
    """A function of tokens, [t, C] -> [t, C], of those that are valid; zero elsewhere; x: [n, N, C], valid: [n, N]."""
    index = valid.flatten().nonzero().squeeze(1)
    tokens = x.flatten(0, 1)
    return torch.zeros_like(tokens).index_copy(0, index, function(tokens.index_select(0, index))).view_as(x)


def region_mask(region: Tensor) -> Tensor:
    """What is added to the logits of tokens of different regions; [n, N] -> [n, N, N]."""
    return (region.unsqueeze(1) != region.unsqueeze(2)) * SEPARATED


@register_view(PatchMerging)
def merged_patches(block: PatchMerging, call: BlockCall) -> View | None:
    """Patches, unfolded: [patches, K]."""
    names = ("x", "input_size")
    x, (height, width) = (*call.args, *(call.kwargs[n] for n in names[len(call.args) :]))  # x: [1, H * W, C]
    if not _runs(block, PatchMerging) or len(x) != 1:
        return None
    grid = x.view(1, height, width, -1).permute(0, 3, 1, 2)
    grid = block.adap_padding(grid) if block.adap_padding else grid
    return View(MergedPatches(block), (block.sampler(grid)[0].t().contiguous(),), lambda t: t[0])


class MergedPatches(nn.Module):
    """A PatchMerging on patches that are already cut; shares its modules and their names."""

    def __init__(self, block: PatchMerging) -> None:
        super().__init__()
        self.norm, self.reduction = block.norm, block.reduction

    def forward(self, x: Tensor) -> Tensor:
        """[patches, K] -> [patches, C]."""
        return self.reduction(self.norm(x) if self.norm else x)


@register_view(PatchEmbed)
def embedded_patches(block: PatchEmbed, call: BlockCall) -> View | None:
    """Patches of the image: [patches, 3, kH, kW]."""
    (x,) = (*call.args, *call.kwargs.values())  # [1, 3, H, W]
    conv = block.projection
    apart = not any(conv.padding) and all(d == 1 for d in conv.dilation) and not needs_whole_input(conv)
    if not _runs(block, PatchEmbed) or len(x) != 1 or not apart:
        return None
    x = block.adap_padding(x) if block.adap_padding else x
    patches = F.unfold(x, conv.kernel_size, conv.dilation, conv.padding, conv.stride)[0].t()
    patches = patches.reshape(-1, conv.in_channels, *conv.kernel_size)
    return View(EmbeddedPatches(block), (patches,), lambda t: t[0])


class EmbeddedPatches(nn.Module):
    """A PatchEmbed on patches that are already cut; shares its modules and their names."""

    def __init__(self, block: PatchEmbed) -> None:
        super().__init__()
        self.projection, self.norm = block.projection, block.norm

    def forward(self, x: Tensor) -> Tensor:
        """[patches, 3, kH, kW] -> [patches, C]."""
        x = self.projection(x).flatten(1)
        return self.norm(x) if self.norm is not None else x


@register_view(BBoxHead, FCNMaskHead)
def rois(block: nn.Module, call: BlockCall) -> View | None:
    """RoIs are independent as they are."""
    bound = inspect.signature(block.forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    return None if bound.kwargs else View(block, bound.args, lambda t: t)


def _runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module computes what its class does in mmdet, not what a subclass made of it."""
    return type(module).forward is cls.forward
