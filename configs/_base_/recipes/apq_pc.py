# `apq` with one weight range per output channel, and with operands of attention products whose ranges are searched from
# 0.1 of the maximum on. MPQ keeps the range of an attention map at 0.9 of its maximum or more; on the demo detectors
# that bound costs most of what 4 bits cost (docs/findings.md), so here the metric may clip as far as it finds good.
_base_ = "./apq.py"

quant = dict(
    recipe="apq_pc",
    formats=dict(
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
        products=dict(attention=dict(format="affine")),
    ),
    search=dict(grids=dict(MatMul=(0.1, 1.2, 100))),
)
