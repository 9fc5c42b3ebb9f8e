# BRECQ (Li et al., ICLR 2021): the rounding of weights learned block by block. As in the paper and the official code:
# asymmetric codes, weights per channel, first rounding (AdaRound) with float activations, then the step sizes of
# activations (LSQ), squared errors of the block's output under Fisher weights g^2 (the code's default has none), inputs
# from the quantized blocks before. Different here: g is the gradient of the detector's distillation loss at the
# quantized model; attention operands have a range per head (the paper has no transformers); 250 and 150 steps of 16
# units (theirs: 20000 and 5000 of 32 images) and learning rates to match, so that a demo detector takes minutes.
_base_ = "./qdrop.py"

quant = dict(
    recipe="brecq",
    search=dict(objective=dict(type="hessian")),
    reconstruction=[
        dict(weighting="hessian", iterations=250, batch=16, keep_float=1.0, rounding_lr=5e-2, step_lr=0.0),
        dict(weighting="hessian", iterations=150, batch=16, keep_float=0.0, rounding_lr=0.0, step_lr=2e-3),
    ],
)
