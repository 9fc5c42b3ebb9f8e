# Mask R-CNN with a narrow four-stage Swin (depths of Swin-T, a third of its width), small enough for a CPU.
_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "./_base_demo_dataset.py",
    "./_base_demo_schedule.py",
]

model = dict(
    backbone=dict(
        _delete_=True,
        type="SwinTransformer",
        pretrain_img_size=224,
        embed_dims=32,
        depths=(2, 2, 6, 2),
        num_heads=(2, 4, 8, 16),
        window_size=7,
        mlp_ratio=4,
        qkv_bias=True,
        drop_path_rate=0.05,
        patch_norm=True,
        out_indices=(0, 1, 2, 3),
        convert_weights=False,
    ),
    neck=dict(in_channels=[32, 64, 128, 256], out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64, anchor_generator=dict(scales=[4])),
    # Small images: RoIs of 28..55 pixels on the finest level, the next octave on the next level, and so on.
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=8),
        mask_roi_extractor=dict(out_channels=64, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=8),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=128)),
        rpn_proposal=dict(nms_pre=300, max_per_img=200),
        rcnn=dict(sampler=dict(num=32)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=300, max_per_img=200)),
)

# Trained in two stages: `mask-rcnn_swin-demo_small.py` first, then this one on three quarters of the images.
train_dataloader = dict(dataset=dict(indices=3000))
