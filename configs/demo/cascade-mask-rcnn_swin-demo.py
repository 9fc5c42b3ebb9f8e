# Cascade Mask R-CNN: the Mask R-CNN's backbone, neck and RPN, with three box heads and three mask heads.
_base_ = "./mask-rcnn_swin-demo.py"

roi_extractor = dict(
    type="SingleRoIExtractor",
    roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=0),
    out_channels=64,
    featmap_strides=[4, 8, 16, 32],
    finest_scale=28,
)
# Stages differ in how narrow a spread of box errors they correct and in the overlap that makes a positive.
box_heads = [
    dict(
        type="Shared2FCBBoxHead",
        in_channels=64,
        fc_out_channels=256,
        roi_feat_size=7,
        num_classes=8,
        bbox_coder=dict(type="DeltaXYWHBBoxCoder", target_means=[0.0, 0.0, 0.0, 0.0], target_stds=stds),
        reg_class_agnostic=True,
        loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
        loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
    )
    for stds in ([0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067])
]
mask_head = dict(
    type="FCNMaskHead",
    num_convs=2,
    in_channels=64,
    conv_out_channels=64,
    num_classes=8,
    loss_mask=dict(type="CrossEntropyLoss", use_mask=True, loss_weight=1.0),
)
rcnn_stages = [
    dict(
        assigner=dict(
            type="MaxIoUAssigner",
            pos_iou_thr=iou,
            neg_iou_thr=iou,
            min_pos_iou=iou,
            match_low_quality=False,
            ignore_iof_thr=-1,
        ),
        sampler=dict(type="RandomSampler", num=32, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
        mask_size=28,
        pos_weight=-1,
        debug=False,
    )
    for iou in (0.5, 0.6, 0.7)
]

model = dict(
    type="CascadeRCNN",
    roi_head=dict(
        _delete_=True,
        type="CascadeRoIHead",
        num_stages=3,
        stage_loss_weights=[1, 0.5, 0.25],
        bbox_roi_extractor=roi_extractor,
        bbox_head=box_heads,
        mask_roi_extractor=dict(roi_extractor, roi_layer=dict(type="RoIAlign", output_size=14, sampling_ratio=0)),
        mask_head=[mask_head] * 3,
    ),
    train_cfg=dict(rcnn=rcnn_stages),
)

# A short fine-tuning: `tools/train_demo.py cascade` starts from the trained Mask R-CNN and sees 1000 images twice.
max_epochs = 2
train_cfg = dict(max_epochs=max_epochs)
train_dataloader = dict(dataset=dict(indices=1000))
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=max_epochs, end=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]
custom_hooks = [dict(type="EMAHook", momentum=0.01, priority=49)]
