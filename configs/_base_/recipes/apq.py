# APQ-ViT (Ding et al., ACM MM 2022, arXiv 2303.14341), a reconstruction, because the paper's equations could not be
# read verbatim: blockwise calibration with bottom elimination, MPQ for softmax, the paper's granularity, exact search.
# The patch embedding's input has 8 bits (the paper's is taken to be float). What is reconstructed, and how, is told in
# docs/method.md.
_base_ = "./minmax.py"

quant = dict(
    recipe="apq",
    search=dict(
        metric="block",
        objective=dict(type="hessian", eliminate=0.10, eliminate_by="error"),
        rounds=3,
        order="backward",
        block_input="float",
        grids=dict(
            Linear=(0.7, 1.1, 100),
            Conv2d=(0.9, 1.2, 100),
            ConvTranspose2d=(0.9, 1.2, 100),
            MatMul=(0.9, 1.2, 100),
        ),
        shortlist=0,
        windows=0,
        rows=0,
    ),
)
