# Mask R-CNN with timm's ViT-S and the simple feature pyramid of ViTDet. All attention is global, unlike ViTDet's:
# the attention map of one 800 x 1333 image takes 400 MiB a block.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),  # as these weights were trained
    backbone=dict(
        _delete_=True,
        type="apq_mmdet.TimmBackbone",
        model_name="vit_small_patch16_224.augreg_in21k_ft_in1k",
        pretrained=True,
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="apq_mmdet.SimpleFeaturePyramid", in_channels=384, out_channels=256, num_outs=5),
)

optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"pos_embed": dict(decay_mult=0.0)}))

# beside a CPU build of torch, mmdet's own tools need it before they build a Runner
custom_imports = dict(imports=["apq_mmdet"])
