# Plain min-max ranges in the number formats of `apq`: the extremes of all calibration images. No paper of its own; what
# other recipes start from.
quant = dict(
    recipe="minmax",
    w_bits=8,
    a_bits=8,
    scope="backbone",
    formats=dict(
        linear=dict(kind="Linear", weight=dict(granularity="tensor")),
        qkv=dict(kind="Linear", pattern="*.qkv", weight=dict(granularity=3)),  # query, key and value apart
        conv=dict(kind="Conv2d", weight=dict(granularity="channel")),
        deconv=dict(kind="ConvTranspose2d", float=True),
        products=dict(
            kind="MatMul",
            query=dict(granularity="head"),
            key=dict(granularity="head"),
            attention=dict(granularity="head", format="matthew"),
            value=dict(granularity="head"),
        ),
        patch_embed=dict(kind="Conv2d", pattern="*patch_embed.proj*", input=dict(bits=8)),
    ),
)
