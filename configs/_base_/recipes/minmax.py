# Plain min-max ranges in the number formats of `apq`.
quant = dict(
    recipe="minmax",
    w_bits=8,
    a_bits=8,
    scope="backbone",
    formats=[
        dict(kind="Linear", pattern="*.qkv", weight=dict(granularity=3)),  # query, key and value apart
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
