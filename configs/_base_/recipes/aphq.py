# APHQ-ViT (Wu et al., CVPR 2025): `qdrop` with squared errors weighted by how the gradient changes under a
# perturbation. As in the official code for detectors: importance abs(g(+e) - g(-e)) of the float model, of mean 1 in
# each image, times the squared error, channels behind a LayerNorm made even, ranges searched by squared error, per
# head. Different here: all blocks are perturbed at once, by random signs times a share of each output's standard
# deviation (theirs one block at a time, by the constant 1e-3); the loss has the RoI heads too (theirs the RPN alone,
# both of its terms divided by themselves); GELU stays unless `mlp_refit=True` makes it a ReLU and refits the MLP, as
# theirs does, there by plain squared errors (theirs weighed by importance); query against key and value against
# projection are made even too. And what differs in `qdrop`.
_base_ = "./qdrop.py"

quant = dict(
    recipe="aphq",
    importance="perturbation",
    equalize=1.0,
    reconstruction=dict(weighting="absolute"),
)
