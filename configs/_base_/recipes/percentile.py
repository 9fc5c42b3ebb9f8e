# Percentile: activation ranges from quantiles. No paper of its own; the observer is that of RepQ-ViT (Li et al., ICCV
# 2023). As in its official code: of the quantiles .999, .9999 and .99999 the one of least squared error, asymmetric
# codes. Different here: quantiles are the mean over the images (theirs of one batch), the lowest value is kept where
# none is negative, weights are min-max (theirs quantiles), and the granularity is that of `minmax`.
_base_ = "./minmax.py"

quant = dict(
    recipe="percentile",
    observer="percentile",
    formats=dict(products=dict(attention=dict(format="affine"))),
)
