# `apq` with one weight range per output channel.
_base_ = "./apq.py"

quant = dict(
    recipe="apq_pc",
    formats=[
        dict(kind="Linear", weight=dict(granularity="channel")),
        dict(kind="Conv2d", weight=dict(granularity="channel")),
        dict(kind="ConvTranspose2d", float=True),
        dict(
            kind="MatMul",
            query=dict(granularity="head"),
            key=dict(granularity="head"),
            attention=dict(granularity="head", format="matthew"),
            value=dict(granularity="head"),
        ),
        dict(kind="Conv2d", pattern="*patch_embed.projection", input=dict(bits=8)),
    ],
)
