# `apq_plus` with attention maps in the shifted logarithmic format of I&S-ViT (arXiv 2311.10126), which keeps small
# probabilities that uniform codes round to zero. No integer kernel multiplies such codes: for simulation, and for
# hardware with look-up tables.
_base_ = "./apq_plus.py"

quant = dict(
    recipe="apq_plus_log",
    formats=dict(products=dict(attention=dict(format="shift_log2"))),
    search=dict(grids=dict(attention=(0.9, 1.0, 2))),
)
