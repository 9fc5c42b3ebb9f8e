# ERQ (Zhong et al., ICML 2024): the formats of RepQ-ViT, and weights that make up for errors. As in the official
# code: ridge regression against the error of quantized inputs, then rounding with the errors of rounded weights
# spread over those that are still free, all tokens equal. Different here: weights are rounded column by column
# (GPTQ's way; theirs one half of the free columns after the other, with a search for better roundings in each); the
# ridge is relative to the inputs' power (theirs 0.1 or 2000); convolutions are compensated too, and inputs are those
# that the compensated layers before give (theirs those of the float model, each quantized alone); ranges of weights
# stay those of before the regression (theirs are taken anew); the bias has no ridge. And what differs in `repq`.
_base_ = "./repq.py"

quant = dict(
    recipe="erq",
    compensation=dict(activations=True, rounding=True, ranges=0, damping=0.02, weighted=False),
)
