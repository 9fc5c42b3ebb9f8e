"""`apq_fast` on even shorter grids: what comes of a range does not matter to the tests of commands."""

_base_ = "../../configs/_base_/recipes/apq_fast.py"

grid = (0.8, 1.1, 3)
quant = dict(search=dict(grids=dict(Linear=grid, Conv2d=grid, ConvTranspose2d=grid, MatMul=grid), shortlist=2))
