# Mask R-CNN with timm's Swin-T, on the schedule of mmdet's Swin-T. Training starts from timm's ImageNet weights, which
# it downloads.
_base_ = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="apq_mmdet.TimmBackbone",
        model_name="swin_tiny_patch4_window7_224.ms_in1k",
        pretrained=True,
        drop_path_rate=0.2,
    ),
)

# beside a CPU build of torch, mmdet's own tools need it before they build a Runner
custom_imports = dict(imports=["apq_mmdet"])
