# Mask R-CNN with timm's DeiT-S and the simple feature pyramid of ViTDet.
_base_ = "./mask-rcnn_timm-vit-s_simple-fpn_1x_coco.py"

model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375]),
    backbone=dict(model_name="deit_small_patch16_224.fb_in1k"),
)
