import pytest
import torch

from apq_mmdet.calibration.objectives import CRITERIA, build_objective, order_statistic


def plain(outputs, targets, grads, share, by):
    """Bottom elimination of one image by sorting, in float64."""
    e = torch.cat([(o.double() - t.double()).reshape(-1) for o, t in zip(outputs, targets, strict=True)])
    g = torch.cat([g.double().reshape(-1) for g in grads])
    rank = {"error": e, "gradient": g, "weighted": g * e}[by].abs()
    kept = rank.argsort()[int(share * len(rank)) :]
    return float((g[kept] * e[kept]).square().sum())


@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5])
def test_against_sorting(share, by):
    outputs, targets, grads = ([torch.randn(2, 3, 7), torch.randn(4, 5)] for _ in range(3))
    got = build_objective(dict(type="hessian", eliminate=share, eliminate_by=by))(outputs, targets, grads, 2)
    assert got.dtype == torch.float64
    for image in range(2):
        rows = [[t.chunk(2)[image] for t in part] for part in (outputs, targets, grads)]
        assert float(got[image]) == pytest.approx(plain(*rows, share, by), rel=1e-5)


def test_hand_computed():
    output, target, grad = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.zeros(4), torch.tensor([1.0, 1.0, 2.0, 0.5])
    drop_one = build_objective(dict(type="hessian", eliminate=0.25))
    assert float(drop_one([output], [target], [grad], 1)) == 4 + 36 + 25
    assert float(build_objective(dict(type="mse"))([output], [target], [grad], 1)) == 114


def test_ties_with_the_threshold_stay():
    ones = torch.ones(10)
    assert float(build_objective(dict(type="mse", eliminate=0.5))([ones], [0 * ones], [ones], 1)) == 10


def test_order_statistic():
    values = torch.tensor([[3.0, 1.0, 2.0], [9.0, 8.0, 7.0]])
    assert order_statistic(values, 1).tolist() == [[2.0], [8.0]]
