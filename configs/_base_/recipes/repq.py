# RepQ-ViT (Li et al., ICCV 2023): channels behind a LayerNorm made even, log sqrt 2 codes of softmax. As in the
# official code: asymmetric codes, weights per channel, activations per tensor, quantile ranges, nothing searched (a
# single factor). Different here: the reparameterization moves scales only, no zero points, because Swin pads windows
# behind the norm; it takes min-max ranges of the channels (theirs quantiles) and makes query and key, value and
# projection even as well; zero is one of the 2^k codes of softmax (theirs comes on top of 2^k values); weights are
# min-max (theirs quantiles); quantiles are the mean over the images (theirs of one batch).
_base_ = "./minmax.py"

quant = dict(
    recipe="repq",
    formats=dict(
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
        products=dict(
            query=dict(granularity="tensor"),
            key=dict(granularity="tensor"),
            attention=dict(granularity="tensor", format="log_sqrt2"),
            value=dict(granularity="tensor"),
        ),
    ),
    observer="percentile",
    equalize=1.0,
    search=dict(
        metric="module",
        objective=dict(type="mse"),
        rounds=1,
        order="forward",
        block_input="float",
        grids=dict(
            Linear=(1.0, 1.0, 1),
            Conv2d=(1.0, 1.0, 1),
            ConvTranspose2d=(1.0, 1.0, 1),
            MatMul=(1.0, 1.0, 1),
        ),
    ),
)
