"""Views of timm's blocks as independent units: windows of Swin blocks, patches of embeddings.

A ViT block has none: its tokens see each other.
"""

import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.layers.format import Format
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, window_partition
from torch import Tensor, nn

from apq_mmdet.calibration.units import VIEWS, Parts, View
from apq_mmdet.layers.base import needs_whole_input
from apq_mmdet.models.mmdet_views import cut_patches, cut_windows, on_valid_tokens, region_mask


@VIEWS.register(SwinTransformerBlock)
def windows(block: SwinTransformerBlock) -> View | None:
    """Windows of N tokens, shifted, padded and partitioned as the block does."""
    if type(block).forward is not SwinTransformerBlock.forward:
        return None

    def parts(x: Tensor) -> Parts:  # [B, H, W, C]
        return cut_windows(x, lambda t: t.flatten(1, 2), *window_layout(block, *x.shape[1:3]))

    return View(WindowBlock(block), parts)


def window_layout(block: SwinTransformerBlock, height: int, width: int) -> tuple[Tensor, Tensor | None]:
    """Which token stands where in which window.

    Returns:
        Index + 1 of each window's tokens, 0 for padding, int64 [n, N]; and the regions that a shifted window must
        keep apart, int64 [n, N], or None without shift.
    """
    shift = block.shift_size
    grid = torch.arange(1, height * width + 1).view(1, height, width, 1)
    if any(shift):
        grid = grid.roll((-shift[0], -shift[1]), (1, 2))  # before it is padded, unlike mmdet's
    down, right = (-n % size for n, size in zip((height, width), block.window_size, strict=True))
    grid = F.pad(grid, (0, 0, 0, right, 0, down))
    token = window_partition(grid, block.window_size).flatten(1)
    if not any(shift):
        return token, None
    bands = [
        (torch.arange(n) >= n - size).long() + (torch.arange(n) >= n - s).long()
        for n, size, s in zip(grid.shape[1:3], block.window_size, shift, strict=True)
    ]  # 0, 1, 2 along each side, after the shift
    region = (3 * bands[0][:, None] + bands[1][None])[None, ..., None]
    return token, window_partition(region, block.window_size).flatten(1)


class WindowBlock(nn.Module):
    """A Swin block on windows that are already cut; shares the block's modules and their names."""

    def __init__(self, block: SwinTransformerBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.drop_path1 = block.norm1, block.attn, block.drop_path1
        self.norm2, self.mlp, self.drop_path2 = block.norm2, block.mlp, block.drop_path2

    def forward(self, x: Tensor, region: Tensor | None, valid: Tensor | None) -> Tensor:
        """x: [n, N, C], zero where padded; region: [n, N] or None; valid: bool [n, N] or None; returns [n, N, C]."""
        y = self.norm1(x)
        if valid is not None:
            y = y * valid.unsqueeze(-1)  # padded after the norm
        x = x + self.drop_path1(self.attn(y, None if region is None else region_mask(region)))
        return self._mlp(x) if valid is None else on_valid_tokens(self._mlp, x, valid)

    def _mlp(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        return x + self.drop_path2(self.mlp(self.norm2(x)))


@VIEWS.register(PatchMerging)
def merged_patches(block: PatchMerging) -> View | None:
    """Patches of 2 x 2 tokens: [patches, 4 C]."""
    if type(block).forward is not PatchMerging.forward:
        return None

    def parts(x: Tensor) -> Parts:  # [B, H, W, C]
        _, height, width, channels = x.shape
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        rows = x.view(-1, 2, x.shape[2] // 2, 2, channels)  # [B H / 2, row, W / 2, column, C]
        patches = rows.permute(0, 2, 3, 1, 4).reshape(-1, 4 * channels)
        return Parts((patches,), lambda t: t.flatten(0, 2))

    return View(MergedPatches(block), parts)


class MergedPatches(nn.Module):
    """A PatchMerging on patches that are already cut; shares its modules and their names."""

    def __init__(self, block: PatchMerging) -> None:
        super().__init__()
        self.norm, self.reduction = block.norm, block.reduction

    def forward(self, x: Tensor) -> Tensor:
        """[patches, 4 C] -> [patches, C']."""
        return self.reduction(self.norm(x))


@VIEWS.register(PatchEmbed)
def embedded_patches(block: PatchEmbed) -> View | None:
    """Patches of the image: [patches, 3, kH, kW]."""
    channels_first = not block.flatten and block.output_fmt is Format.NCHW
    conv = block.proj
    if type(block).forward is not PatchEmbed.forward or channels_first or needs_whole_input(conv):
        return None

    def parts(x: Tensor) -> Parts:  # [B, 3, H, W]
        if block.dynamic_img_pad:
            x = F.pad(x, (0, -x.shape[3] % conv.stride[1], 0, -x.shape[2] % conv.stride[0]))
        return Parts((cut_patches(x, conv),), lambda t: t.flatten(0, -2))

    return View(EmbeddedPatches(block), parts)


class EmbeddedPatches(nn.Module):
    """A PatchEmbed on patches that are already cut; shares its modules and their names."""

    def __init__(self, block: PatchEmbed) -> None:
        super().__init__()
        self.proj, self.norm = block.proj, block.norm

    def forward(self, x: Tensor) -> Tensor:
        """[patches, 3, kH, kW] -> [patches, C]."""
        return self.norm(self.proj(x).flatten(1))
