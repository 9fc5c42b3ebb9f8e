"""Views of mmdet's blocks as independent units: windows of Swin blocks, patches of embeddings, RoIs of heads."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import ShiftWindowMSA, SwinBlock
from mmdet.models.layers import PatchEmbed, PatchMerging
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from torch import Tensor, nn

from apq_mmdet.calibration.units import VIEWS, Parts, View
from apq_mmdet.layers.base import needs_whole_input

SEPARATED = -100.0  # what mmdet adds to the logits of tokens that a shifted window must keep apart


@VIEWS.register(SwinBlock)
def windows(block: SwinBlock) -> View | None:
    """Windows of N tokens, padded, shifted and partitioned as ShiftWindowMSA does."""
    if not (_runs(block, SwinBlock) and _runs(block.attn, ShiftWindowMSA)):
        return None

    def parts(x: Tensor, hw_shape: tuple[int, int]) -> Parts:  # x: [B, H * W, C]
        return cut_windows(x, lambda t: t, *window_layout(block.attn, *hw_shape))

    return View(WindowBlock(block), parts)


def cut_windows(x: Tensor, tokens: Callable[[Tensor], Tensor], token: Tensor, region: Tensor | None) -> Parts:
    """The windows of all images of a batch.

    Args:
        x: a block's input.
        tokens: takes it, and the block's output, to [B, H * W, C].
        token, region: layout of one image's windows, as ``window_layout`` gives it.
    """
    token = token.to(x.device)
    images = len(x)
    padded = (token == 0).repeat(images, 1)  # [B n, N]

    def to_windows(t: Tensor) -> Tensor:
        return F.pad(tokens(t), (0, 0, 1, 0))[:, token].flatten(0, 1)  # [B n, N, C], zero where padded

    any_padded = bool(padded.any())
    region = None if region is None else region.to(x.device).repeat(images, 1)
    padding = padded.sum(1) * x.shape[-1] if any_padded else None
    return Parts((to_windows(x), region, ~padded if any_padded else None), to_windows, padding, tokens=token.shape[1])


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


@VIEWS.register(PatchMerging)
def merged_patches(block: PatchMerging) -> View | None:
    """Patches, unfolded: [patches, K]."""
    if not _runs(block, PatchMerging):
        return None

    def parts(x: Tensor, input_size: tuple[int, int]) -> Parts:  # x: [B, H * W, C]
        grid = x.unflatten(1, tuple(input_size)).permute(0, 3, 1, 2)
        grid = block.adap_padding(grid) if block.adap_padding else grid
        patches = block.sampler(grid).transpose(1, 2)  # [B, patches, K]
        return Parts((patches.flatten(0, 1).contiguous(),), lambda t: t.flatten(0, 1))

    return View(MergedPatches(block), parts)


class MergedPatches(nn.Module):
    """A PatchMerging on patches that are already cut; shares its modules and their names."""

    def __init__(self, block: PatchMerging) -> None:
        super().__init__()
        self.norm, self.reduction = block.norm, block.reduction

    def forward(self, x: Tensor) -> Tensor:
        """[patches, K] -> [patches, C]."""
        return self.reduction(self.norm(x) if self.norm else x)


@VIEWS.register(PatchEmbed)
def embedded_patches(block: PatchEmbed) -> View | None:
    """Patches of the image: [patches, 3, kH, kW]."""
    conv = block.projection
    apart = not any(conv.padding) and all(d == 1 for d in conv.dilation) and not needs_whole_input(conv)
    if not _runs(block, PatchEmbed) or not apart:
        return None

    def parts(x: Tensor) -> Parts:  # [B, 3, H, W]
        x = block.adap_padding(x) if block.adap_padding else x
        return Parts((cut_patches(x, conv),), lambda t: t.flatten(0, 1))

    return View(EmbeddedPatches(block), parts)


def cut_patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """What an unpadded convolution sees in each of its places, [B, C, H, W] -> [B places, C, kH, kW]."""
    patches = F.unfold(x, conv.kernel_size, stride=conv.stride).transpose(1, 2)  # [B, places, C kH kW]
    return patches.reshape(-1, conv.in_channels, *conv.kernel_size)


class EmbeddedPatches(nn.Module):
    """A PatchEmbed on patches that are already cut; shares its modules and their names."""

    def __init__(self, block: PatchEmbed) -> None:
        super().__init__()
        self.projection, self.norm = block.projection, block.norm

    def forward(self, x: Tensor) -> Tensor:
        """[patches, 3, kH, kW] -> [patches, C]."""
        x = self.projection(x).flatten(1)
        return self.norm(x) if self.norm is not None else x


@VIEWS.register(BBoxHead, FCNMaskHead)
def rois(block: nn.Module) -> View | None:
    """RoIs are independent as they are."""
    signature = inspect.signature(block.forward)
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD)
    if any(parameter.kind in by_keyword for parameter in signature.parameters.values()):
        return None

    def parts(*args: Any, **kwargs: Any) -> Parts:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Parts(bound.args, lambda t: t)

    return View(block, parts)


def _runs(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether a module computes what its class does in mmdet, not what a subclass made of it."""
    return type(module).forward is cls.forward
