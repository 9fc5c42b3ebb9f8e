"""Rounding of a weight matrix whose errors are spread over the columns that are still free (OBQ, GPTQ)."""

import torch
from torch import Tensor

COLUMNS = 64  # that are rounded before the ones behind them hear of it


def nearest_codes(weight: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes less the zero point; all broadcast against [N, K]."""
    return torch.minimum(torch.maximum((weight / scale).round(), low), high)


def spread_rounding(weight: Tensor, hessian: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes less the zero point, [N, K], that make (W - Q) H (W - Q)^T small.

    Columns are rounded in falling order of H's diagonal. What rounding a column costs is made up for by the columns
    that are still free, in closed form: with U the upper Cholesky factor of H^-1, the error of column j over U[j, j]
    times row j of U is taken off them. The columns of a later group hear of a whole group's errors at once, in one
    matrix product (GPTQ's lazy batches, Frantar et al., ICLR 2023).

    Args:
        weight: [N, K], float64.
        hessian: [K, K], positive definite.
        scale, low, high: step, lowest and highest code less the zero point, [N, 1].
    """
    order = hessian.diagonal().argsort(descending=True, stable=True)
    left = weight[:, order]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    codes, errors = torch.empty_like(left), torch.empty_like(left)
    for start in range(0, left.shape[1], COLUMNS):
        stop = min(start + COLUMNS, left.shape[1])
        for j in range(start, stop):
            column = left[:, j : j + 1]
            codes[:, j : j + 1] = nearest_codes(column, scale, low, high)
            errors[:, j : j + 1] = (column - codes[:, j : j + 1] * scale) / upper[j, j]
            left[:, j + 1 : stop].addmm_(errors[:, j : j + 1], upper[j : j + 1, j + 1 : stop], alpha=-1)
        left[:, stop:].addmm_(errors[:, start:stop], upper[start:stop, stop:], alpha=-1)
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result
