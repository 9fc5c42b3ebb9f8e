# QwT (Fu et al., CVPR 2025, arXiv 2411.13918): the formats and ranges of `repq`, and a linear correction of each Swin
# block's output, y = y_q + W x_q + b, in closed form. As in the paper (its code could not be read): x_q is what the
# compensated blocks before give. The correction is float: C^2 multiply-accumulates a token and 4 (C^2 + C) bytes for
# each block. Different here: y is what the float model has at that place (theirs: the float block on x_q), W has a
# small ridge. And what differs in `repq`.
_base_ = "./repq.py"

quant = dict(
    recipe="qwt",
    search=dict(block_input="quantized"),
    output_compensation=True,
)
