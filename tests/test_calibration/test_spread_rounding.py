"""Rounding with its errors spread over the columns that are left, against brute force and a slow OBQ."""

import itertools

import pytest
import torch

from apq_mmdet.calibration.spread_rounding import COLUMNS, spread_rounding


def problem(columns=3, rows=4, bits=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(40, columns, generator=generator, dtype=torch.float64)
    data = data @ torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    scale = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / (2**bits - 1)
    low = (weight.amin(1, keepdim=True) / scale).round()
    return weight, data.T @ data, scale, low, low + 2**bits - 1


def nearest(weight, scale, low, high):
    return (weight / scale).round().clamp(low, high)


def cost(codes, weight, scale, hessian):
    gap = weight - codes * scale
    return ((gap @ hessian) * gap).sum(1)


def slow_obq(weight, hessian, scale, low, high):
    """After each column, the free columns are solved for anew by least squares."""
    order = sorted(range(len(hessian)), key=lambda j: -float(hessian[j, j]))
    codes = torch.zeros_like(weight)
    for row in range(len(weight)):
        left = weight[row].clone()
        for position, j in enumerate(order):
            codes[row, j] = (left[j] / scale[row, 0]).round().clamp(low[row, 0], high[row, 0])
            fixed, free = order[: position + 1], order[position + 1 :]
            gap = weight[row, fixed] - codes[row, fixed] * scale[row, 0]
            if free:  # argmin over d of the cost of (gap, d)
                left[free] = weight[row, free] + torch.linalg.solve(
                    hessian[free][:, free], hessian[free][:, fixed] @ gap
                )
    return codes


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("columns", [7, 2 * COLUMNS + 3])
def test_rounding_is_that_of_a_slow_obq(seed, columns):
    weight, hessian, scale, low, high = problem(columns=columns, bits=3, seed=seed)
    hessian += 0.1 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    assert torch.equal(spread_rounding(weight, hessian, scale, low, high), slow_obq(weight, hessian, scale, low, high))


def test_rounding_against_brute_force():
    sums = torch.zeros(3, dtype=torch.float64)
    for seed in range(30):
        weight, hessian, scale, low, high = problem(seed=seed)
        spread = cost(spread_rounding(weight, hessian, scale, low, high), weight, scale, hessian)
        plain = cost(nearest(weight, scale, low, high), weight, scale, hessian)
        steps = torch.tensor(list(itertools.product(range(4), repeat=3)), dtype=torch.float64)  # [64, 3]
        best = torch.stack([cost(low + step, weight, scale, hessian) for step in steps]).amin(0)
        assert bool((best <= spread + 1e-9).all())
        sums += torch.stack([best, spread, plain]).sum(1)
    best, spread, plain = sums.tolist()
    assert best < spread < plain
    assert (spread - best) < 0.5 * (plain - best)


def test_rounding_puts_the_columns_back():
    weight, hessian, scale, low, high = problem(columns=6, bits=3)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    codes = spread_rounding(weight, hessian, scale, low, high)
    assert torch.equal(spread_rounding(weight[:, order], hessian[order][:, order], scale, low, high), codes[:, order])
    even = spread_rounding(weight, torch.eye(6, dtype=torch.float64), scale, low, high)
    assert torch.equal(even, nearest(weight, scale, low, high))  # nothing to spread to
