# The same with Swin-B.
_base_ = "./cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc-giou-ms-crop-3x_coco.py"

checkpoint_file = "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224.pth"

model = dict(
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(checkpoint=checkpoint_file),
    ),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
