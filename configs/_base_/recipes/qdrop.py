# QDrop (Wei et al., ICLR 2022): rounding and step sizes learned together while half of each activation's elements
# stay float. As in the official code: asymmetric codes, weights per channel, plain squared error of the block's
# output, drop probability 0.5, inputs from the quantized blocks before. Different here: the block's input is wholly
# that (theirs is mixed with the float one); ranges are searched by squared error at the layer's output, one round of
# 20 factors, one factor for all output channels of a weight (theirs by the power 2.4 of the tensor's own error, scale
# and zero point, one for each channel); attention operands have a range per head (the paper has no transformers); 300
# steps of 16 units (theirs: 20000 of 32 images) and learning rates to match, so that a demo detector takes minutes.
_base_ = "./minmax.py"

quant = dict(
    recipe="qdrop",
    formats=dict(
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
        products=dict(attention=dict(format="affine")),
    ),
    search=dict(
        metric="module",
        objective=dict(type="mse"),
        rounds=1,
        order="forward",
        block_input="quantized",
        grids=dict(
            Linear=(0.5, 1.1, 20),
            Conv2d=(0.5, 1.1, 20),
            ConvTranspose2d=(0.5, 1.1, 20),
            MatMul=(0.5, 1.1, 20),
        ),
    ),
    reconstruction=dict(weighting="none", iterations=300, batch=16, keep_float=0.5, rounding_lr=5e-2, step_lr=2e-3),
)
