# FIMA-Q (Wu et al., CVPR 2025): `qdrop` under a Fisher matrix that is a diagonal plus one of low rank. As in the
# official code: abs(g) on the diagonal, absolute gradients and errors in the part of low rank, both parts scaled to
# start alike, channels behind a LayerNorm made even, ranges searched by squared error. Different here: rank one for
# each unit (a window, a patch, a RoI) from its own gradient (theirs: rank 5, from gradients and errors averaged over
# the images); the gradient is taken once, where all blocks are quantized (theirs five times while a block is trained,
# where it alone is); query against key and value against projection are made even too. And what differs in `qdrop`.
_base_ = "./qdrop.py"

quant = dict(
    recipe="fimaq",
    equalize=1.0,
    reconstruction=dict(weighting="fisher"),
)
