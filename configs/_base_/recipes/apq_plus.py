# The recommended recipe: channels made even, one weight range per output channel, ranges searched at the layers'
# outputs, weights that make up for what quantized activations and their own rounding cost, and codes of two and three
# bits that are learned; inputs of three bits have a range for each token, those of heads from four bits down one for
# each RoI or feature map.
_base_ = "./minmax.py"

quant = dict(
    recipe="apq_plus",
    formats=dict(  # rules apply in the order of their names
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
        # no norm stands before these inputs whose weights could make the channels even
        ffn=dict(kind="Linear", pattern=r"re:.*(ffn\.layers\.1|mlp\.fc2)", input=dict(granularity="channel")),
        head_convs=dict(kind="Conv2d", pattern=r"re:(neck|.*head)\..*", input=dict(granularity="channel")),
        head_fcs=dict(kind="Linear", pattern=r"re:(neck|.*head)\..*", input=dict(granularity="channel")),
        # sixteen are too few for one range of all RoIs, or of all levels that share a head
        head_convs_dynamic=dict(
            kind="Conv2d", pattern=r"re:(rpn|roi|bbox)_head\..*", max_bits=4, input=dict(format="dynamic_affine")
        ),
        head_fcs_dynamic=dict(
            kind="Linear",
            pattern=r"re:roi_head\..*",
            max_bits=4,
            input=dict(format="dynamic_affine", granularity="tensor"),
        ),
        # eight levels are too few for one range of all tokens
        linear_low=dict(
            kind="Linear",
            pattern=r"re:(?!roi_head\.).*",
            max_bits=3,
            input=dict(format="token_affine", granularity="channel"),
        ),
        # queries and keys are signed int8 numbers: with eight bits around zero, with fewer less their zero points
        products=dict(query=dict(symmetric=True), key=dict(symmetric=True), attention=dict(format="row_affine")),
        products_low=dict(kind="MatMul", max_bits=7, query=dict(symmetric=False), key=dict(symmetric=False)),
    ),
    equalize=1.0,
    search=dict(
        metric="module",
        objective=dict(type="mse"),
        # of what a head predicts, little matters to the detections
        objectives=dict(heads=dict(pattern=r"re:(neck|.*head).*", type="hessian")),
        rounds=1,
        order="forward",
        block_input="quantized",
        # of a large image a part tells enough; the demo detectors' images have fewer tokens
        tokens=4096,
        grids=dict(
            Linear=(0.3, 1.1, 41),
            Conv2d=(0.3, 1.1, 41),
            ConvTranspose2d=(0.3, 1.1, 41),
            MatMul=(0.1, 1.1, 51),
        ),
    ),
    compensation=dict(activations=True, rounding=True, ranges=41, damping=0.1, weighted=False),
    # four or eight levels a weight are too few for closed forms alone
    reconstruction=dict(
        max_bits=3,
        rounding="straight_through",
        weighting="none",
        iterations=600,
        batch=16,
        keep_float=0.0,
        rounding_lr=0.01,
        step_lr=5e-3,
    ),
)
