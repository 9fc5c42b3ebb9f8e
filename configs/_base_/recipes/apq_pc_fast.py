# `apq_pc` with the search of `apq_fast`, and 23 candidates for the wider ranges of attention operands.
_base_ = "./apq_fast.py"

quant = dict(
    recipe="apq_pc_fast",
    formats=dict(
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
        products=dict(attention=dict(format="affine")),
    ),
    search=dict(grids=dict(MatMul=(0.1, 1.2, 23))),
)
