# I&S-ViT (Zhong et al., 2023, arXiv 2311.10126): shift-uniform-log2 codes of softmax and a smooth optimization. As in
# the official code: weights per channel, channels behind a LayerNorm made even, two stages that learn against the
# float model's block output by squared error, on inputs from the quantized blocks before. Different here: step sizes
# are learned in the first stage and roundings in the second, weights being quantized in both (theirs trains the
# weights themselves in both, at fixed steps, and leaves them float in the first); channels are made even before the
# first stage (theirs between the two, with zero points), and so are query against key and value against projection;
# softmax codes u' keep their fractions (theirs are rounded to whole numbers, which lets codes collapse); 200 steps of
# 16 units a stage (theirs: 1000 of 64 images), so that a demo detector takes minutes.
_base_ = "./minmax.py"

quant = dict(
    recipe="isvit",
    formats=dict(
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
        products=dict(
            query=dict(granularity="tensor"),
            key=dict(granularity="tensor"),
            attention=dict(granularity="tensor", format="shift_log2"),
            value=dict(granularity="tensor"),
        ),
    ),
    equalize=1.0,
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
            attention=(0.9, 1.0, 2),
        ),
    ),
    reconstruction=[
        dict(weighting="none", iterations=200, batch=16, keep_float=0.0, rounding_lr=0.0, step_lr=2e-3),
        dict(weighting="none", iterations=200, batch=16, keep_float=0.0, rounding_lr=5e-2, step_lr=0.0),
    ],
)
