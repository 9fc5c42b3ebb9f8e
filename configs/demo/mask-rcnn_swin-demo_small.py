# First stage of training `mask-rcnn_swin-demo.py`: from scratch, on images of half the pixels.
_base_ = "./mask-rcnn_swin-demo.py"

max_epochs = 3
train_cfg = dict(max_epochs=max_epochs)
train_dataloader = dict(dataset=dict(indices=None, pipeline={{_base_.small_train_pipeline}}))
optim_wrapper = dict(optimizer=dict(lr=7e-4))
# The decay is left at three quarters of its way: the full-size stage goes on from there.
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=250),
    dict(type="CosineAnnealingLR", T_max=4, end=4, eta_min=1e-5, convert_to_iter_based=True),
]
custom_hooks = [dict(type="EMAHook", momentum=0.002, priority=49)]
