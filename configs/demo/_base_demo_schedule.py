# One epoch of fine-tuning at full size: AdamW, warm-up, cosine decay, averaged weights.
_base_ = "mmdet::_base_/default_runtime.py"

# before mmdet's tools build a Runner, whose log imports torchvision: see apq_mmdet.torchvision_operators
custom_imports = dict(imports=["apq_mmdet"])

max_epochs = 1
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=max_epochs, val_begin=1000)  # measured by mmdet's test tool
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")

optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="AdamW", lr=3e-4, betas=(0.9, 0.999), weight_decay=0.05, fused=True),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0, custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0))
    ),
    clip_grad=dict(max_norm=10, norm_type=2),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", T_max=max_epochs, end=max_epochs, eta_min=1e-5, convert_to_iter_based=True),
]

default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
# The averaged weights are what a checkpoint's state_dict holds.
custom_hooks = [dict(type="EMAHook", momentum=0.004, priority=49)]
randomness = dict(seed=0)
