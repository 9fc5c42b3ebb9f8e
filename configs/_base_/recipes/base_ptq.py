# Base PTQ, the baseline of PTQ4ViT (Yuan et al., ECCV 2022). As in the official code: symmetric codes, query, key and
# value of a fused qkv apart, attention operands per head, range factors 0.5 to 1.2 of the maximum, cosine at the
# layer's output, one round, weight before input. Different here: one factor for all heads, and for the weights of
# query, key and value (theirs one each); one cosine for a product of attention in a window, all heads together (theirs
# one for each row); factor 1 is max / (2^(k-1) - 1) (theirs max / (2^(k-1) - 0.5)); convolutions per channel; patch
# embedding's input with 8 bits (theirs float).
_base_ = "./minmax.py"

quant = dict(
    recipe="base_ptq",
    formats=dict(
        linear=dict(weight=dict(symmetric=True), input=dict(symmetric=True)),
        qkv=dict(weight=dict(symmetric=True)),
        conv=dict(weight=dict(symmetric=True), input=dict(symmetric=True)),
        products=dict(
            query=dict(symmetric=True),
            key=dict(symmetric=True),
            attention=dict(format="affine", symmetric=True),
            value=dict(symmetric=True),
        ),
    ),
    search=dict(
        metric="module",
        objective=dict(type="cosine"),
        rounds=1,
        order="forward",
        block_input="float",
        grids=dict(
            Linear=(0.5, 1.2, 100),
            Conv2d=(0.5, 1.2, 100),
            ConvTranspose2d=(0.5, 1.2, 100),
            MatMul=(0.5, 1.2, 100),
        ),
    ),
)
