# BRECQ (Li et al., ICLR 2021): the rounding of weights learned block by block. As in the paper: squared errors of the
# block's output under Fisher weights g^2 (the code has none by default, else (abs(g) + 1)^2). As in the official code:
# asymmetric codes, weights per channel, first rounding (AdaRound) with float activations, then the step sizes of
# activations (LSQ), inputs from the quantized blocks before. Different here: each block learns both before the next one
# (theirs the rounding of all blocks first); steps learn by the same errors (theirs by their power 2.4, on float
# inputs); ranges are searched by g^2 e^2 at the layer's output (theirs by the power 2.4 of each channel's own error); g
# is the gradient of the detector's distillation loss at the quantized model; 250 and 150 steps of 16 units (theirs:
# 20000 and 5000 of 32 images). And what differs in `qdrop`.
_base_ = "./qdrop.py"

quant = dict(
    recipe="brecq",
    search=dict(objective=dict(type="hessian")),
    reconstruction=[
        dict(weighting="hessian", iterations=250, batch=16, keep_float=1.0, rounding_lr=5e-2, step_lr=0.0),
        dict(weighting="hessian", iterations=150, batch=16, keep_float=0.0, rounding_lr=0.0, step_lr=2e-3),
    ],
)
