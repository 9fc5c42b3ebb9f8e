# PTQ4ViT (Yuan et al., ECCV 2022): twin uniform quantization and the Hessian-guided metric. As in the official code:
# symmetric codes, query, key and value of a fused qkv apart, also in attention products, there per head, range factors
# 0.01 to 1.2, three rounds at the layer's output, twin formats for softmax and for the input behind the GELU,
# convolutions per channel. Different here: the gradient is that at the quantized model's block output, pulled back
# through the float block (theirs, of a model against itself, is rounding noise: docs/method.md); a softmax value is of
# one of the two ranges (theirs is the sum of both);
# one factor for all heads, and for the weights of query, key and value (theirs one each); factor 1 is max / (2^(k-1) -
# 1) (theirs max / (2^(k-1) - 0.5)); no bias correction; patch embedding's input with 8 bits (theirs float).
_base_ = "./minmax.py"

quant = dict(
    recipe="ptq4vit",
    formats=dict(
        linear=dict(weight=dict(symmetric=True), input=dict(symmetric=True)),
        qkv=dict(weight=dict(symmetric=True)),
        conv=dict(weight=dict(symmetric=True), input=dict(symmetric=True)),
        products=dict(
            query=dict(symmetric=True),
            key=dict(symmetric=True),
            attention=dict(granularity="tensor", format="twin_softmax"),
            value=dict(symmetric=True),
        ),
        post_gelu=dict(
            kind="Linear", pattern=r"re:.*(ffn\.layers\.1|mlp\.fc2)", input=dict(format="twin_gelu", symmetric=False)
        ),
    ),
    search=dict(
        metric="module",
        objective=dict(type="hessian"),
        rounds=3,
        order="forward",
        block_input="float",
        grids=dict(
            Linear=(0.01, 1.2, 100),
            Conv2d=(0.01, 1.2, 100),
            ConvTranspose2d=(0.01, 1.2, 100),
            MatMul=(0.01, 1.2, 100),
        ),
    ),
)
