"""Blocks of mmdet that no view takes apart, because their parts are not what is seen in them."""

from mmdet.models.layers import PatchEmbed
from mmdet.models.roi_heads.bbox_heads import BBoxHead

from apq_mmdet.models.mmdet_views import embedded_patches, rois


def test_patches_with_gaps_are_not_cut():
    plain, dilated = (PatchEmbed(embed_dims=8, kernel_size=4, stride=8, padding=0, dilation=d) for d in (1, 2))
    assert embedded_patches(plain) is not None
    assert embedded_patches(dilated) is None


def test_heads_that_take_arguments_by_name_alone_stay_whole():
    class Scaled(BBoxHead):
        def forward(self, x, *, scale=1.0):
            return super().forward(x * scale)

    class Ignoring(BBoxHead):
        def forward(self, x, **_):
            return super().forward(x)

    assert rois(BBoxHead()) is not None
    assert rois(Scaled()) is None
    assert rois(Ignoring()) is None
