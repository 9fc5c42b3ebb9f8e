"""The simple feature pyramid of ViTDet (Li et al., ECCV 2022, arXiv 2203.16527)."""

from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from apq_mmdet.calibration.blocks import register_block
from apq_mmdet.errors import BadInputError
from apq_mmdet.registry import MODELS


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps of strides 4, 8, 16, 32 and so on from the one map, of stride 16, that a plain ViT gives.

    Two transposed convolutions, one, none, and max pooling change the size; each map then passes a 1x1 and a 3x3
    convolution with a norm behind each. What follows the fourth map is the one before, subsampled.

    Args:
        in_channels: of the ViT's map, a multiple of 4.
        out_channels: of every map given.
        num_outs: number of maps, at least 4.
        init_cfg: mmengine's.

    Raises:
        BadInputError: channels or number of maps that do not fit.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 5,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if in_channels % 4:
            raise BadInputError(f"SimpleFeaturePyramid: in_channels must be a multiple of 4, got {in_channels}")
        if num_outs < 4:
            raise BadInputError(f"SimpleFeaturePyramid: num_outs must be at least 4, got {num_outs}")
        self.num_outs = num_outs
        half, quarter = in_channels // 2, in_channels // 4
        up_to_4 = nn.Sequential(
            nn.ConvTranspose2d(in_channels, half, 2, 2),
            ChannelNorm(half, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, 2),
        )
        up_to_8 = nn.ConvTranspose2d(in_channels, half, 2, 2)
        down_to_32 = nn.MaxPool2d(2, ceil_mode=True)  # of an odd side nothing is lost
        self.resizers = nn.ModuleList([up_to_4, up_to_8, nn.Identity(), down_to_32])
        channels = (quarter, half, in_channels, in_channels)
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, out_channels, 1, bias=False),
                ChannelNorm(out_channels, eps=1e-6),
                nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
                ChannelNorm(out_channels, eps=1e-6),
            )
            for c in channels
        )

    def forward(self, inputs: tuple[Tensor]) -> tuple[Tensor, ...]:
        """([B, C, h, w],) -> maps [B, out_channels, 4 h, 4 w], [.., 2 h, 2 w], [.., h, w], [.., h / 2, w / 2], ..."""
        (x,) = inputs
        maps = [conv(resize(x)) for resize, conv in zip(self.resizers, self.convs, strict=True)]
        while len(maps) < self.num_outs:
            maps.append(F.max_pool2d(maps[-1], 1, 2))
        return tuple(maps)


register_block(SimpleFeaturePyramid)
