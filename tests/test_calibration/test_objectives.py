import pytest
import torch

from apq_mmdet.calibration.objectives import CRITERIA, build_objective, by_sorting, order_statistic


def plain(e, g, dropped, by):
    """Bottom elimination of one image by sorting, in float64."""
    e, g = e.double(), g.double()
    rank = {"error": e, "gradient": g, "weighted": g * e}[by].abs()
    kept = rank.argsort()[dropped:]
    return float((g[kept] * e[kept]).square().sum())


@pytest.mark.parametrize("by", CRITERIA)
@pytest.mark.parametrize("dropped", [0, 10, 52, 103])
def test_against_sorting(dropped, by):
    error, grad = torch.randn(104), torch.randn(104)
    got = build_objective(dict(type="hessian", eliminate=0.1, eliminate_by=by))(error.clone(), grad, error, dropped)
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(plain(error, grad, dropped, by), rel=1e-5)


@pytest.mark.parametrize("by", CRITERIA)
def test_some_elements_give_a_lower_bound(by):
    objective = build_objective(dict(type="hessian", eliminate=0.1, eliminate_by=by))
    error, grad = torch.randn(100), torch.randn(100)
    bounds = [float(objective(error[:n].clone(), grad[:n], error[:n], 10)) for n in (5, 10, 20, 50, 100)]
    assert bounds[:2] == [0, 0]
    assert bounds == sorted(bounds)


def test_hand_computed():
    error, grad = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([1.0, 1.0, 2.0, 0.5])
    assert float(build_objective(dict(type="hessian"))(error.clone(), grad, error, 1)) == 4 + 36 + 25
    assert float(build_objective(dict(type="mse"))(error, grad, error, 0)) == 114


def test_ties_with_the_threshold_stay():
    ones = torch.ones(10)
    assert float(build_objective(dict(type="mse"))(ones, ones, ones, 5)) == 10


def test_order_statistic():
    values = torch.tensor([3.0, 1.0, 2.0])
    assert [float(order_statistic(values, i)) for i in range(3)] == [1, 2, 3]
    rows = torch.randn(7, 5)
    assert all(torch.equal(order_statistic(rows, i), by_sorting(rows, i)) for i in range(35))  # as on a GPU


def test_cosine_of_each_unit():
    target = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    output = torch.tensor([[5.0, 0.0], [1.0, 0.0], [-3.0, 0.0]])  # the same direction, at a right angle, opposite
    error = output - target
    assert float(build_objective(dict(type="cosine"))(error, error, target, 0)) == pytest.approx(0 + 1 + 2)
    nothing, something = torch.zeros(2, 2), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for output, target, expected in ((nothing, something, 2), (something, nothing, 2), (nothing, nothing, 0)):
        assert float(build_objective(dict(type="cosine"))(output - target, None, target, 0)) == expected
    with pytest.raises(ValueError, match=r"eliminate must be 0, got 0\.1"):
        build_objective(dict(type="cosine", eliminate=0.1))
