# The same with Swin-S.
_base_ = "./cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc-giou-ms-crop-3x_coco.py"

checkpoint_file = (
    "https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth"
)

model = dict(backbone=dict(depths=[2, 2, 18, 2], init_cfg=dict(checkpoint=checkpoint_file)))
