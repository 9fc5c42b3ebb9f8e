# AdaLog (Wu et al., ECCV 2024): logarithmic codes of softmax whose base is searched. As in the official code:
# asymmetric codes, weights per channel, query, key and value per head, base 2^(Q / 37) with one Q for all heads,
# channels behind a LayerNorm made even, three rounds at the layer's output by squared error. Different here: 12
# values of Q (theirs each whole one from 10 up); a code's scale is searched from 0.6 to 1.0 of the largest
# probability (theirs is 1); one factor for both ends of a range, all candidates judged (theirs scale and zero point,
# from coarse to fine); one range factor for all output channels of a weight (theirs one each); no logarithmic codes
# and no bias shift behind the GELU; no rounded table in evaluation; zero is one of the 2^k codes; query against key
# and value against projection made even too, and no zero points moved (as in `repq`).
_base_ = "./minmax.py"

quant = dict(
    recipe="adalog",
    formats=dict(
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
        products=dict(attention=dict(granularity="tensor", format="adaptive_log")),
    ),
    equalize=1.0,
    search=dict(
        metric="module",
        objective=dict(type="mse"),
        rounds=3,
        order="forward",
        block_input="float",
        grids=dict(
            Linear=(0.4, 1.1, 71),
            Conv2d=(0.4, 1.1, 71),
            ConvTranspose2d=(0.4, 1.1, 71),
            MatMul=(0.4, 1.1, 36),
            attention=(0.6, 1.0, 5),
        ),
    ),
)
