# `apq` with one weight range per output channel.
_base_ = "./apq.py"

quant = dict(
    recipe="apq_pc",
    formats=dict(
        linear=dict(weight=dict(granularity="channel")),
        qkv=dict(weight=dict(granularity="channel")),
    ),
)
