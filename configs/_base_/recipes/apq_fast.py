# A fast form of `apq` for slow machines. It differs in four ways: 20 candidates instead of 100, of which the module
# metric lets the best 6 through to the block metric; one round; at most 2 x 2 windows of an image; at most 32 RoIs.
_base_ = "./apq.py"

quant = dict(
    recipe="apq_fast",
    search=dict(
        rounds=1,
        grids=dict(
            Linear=(0.7, 1.1, 20),
            Conv2d=(0.9, 1.2, 20),
            ConvTranspose2d=(0.9, 1.2, 20),
            MatMul=(0.9, 1.2, 20),
        ),
        shortlist=6,
        windows=2,
        rows=32,
    ),
)
