import pytest
import torch
from helpers import observed, recipe
from torch import nn

from apq_mmdet.calibration.objectives import build_objective
from apq_mmdet.calibration.scoring import TOGETHER, Candidate, best_candidate, candidate_errors, sum_by_image
from apq_mmdet.calibration.units import SCREENS, UnitCall
from apq_mmdet.errors import CalibrationError
from apq_mmdet.layers import quantize_model, quantized_layers

NAN, INF = float("nan"), float("inf")


class Errors:
    """Known errors; the most important units of a share make ``mass`` of them, by share."""

    def __init__(self, errors, mass=0.95):
        self.errors = torch.tensor(errors, dtype=torch.float64)
        self.masses = {share: mass * min(1.0, share / 0.1) for share in SCREENS}
        self.cost = 0.0
        self.shares = []

    def __call__(self, candidates, share):
        assert candidates
        self.cost += len(candidates) * share
        self.shares.append(share)
        return self.errors[candidates] * (1.0 if share == 1 else self.masses[share])


@pytest.mark.parametrize("eliminate", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("eliminate_by", ["error", "gradient", "weighted"])
@torch.no_grad()
def test_the_most_important_units_bound_the_whole_error(eliminate, eliminate_by):
    """Even if the errors that are dropped are the most important ones: of large gradients."""
    layer = nn.Linear(6, 5)
    quantize_model(model := nn.Sequential(layer), recipe("minmax").policy)
    ((_, layer),) = quantized_layers(model)
    x = torch.randn(50, 6)
    (targets,) = observed(layer, [(x,)])
    grads = 1 / ((layer(x) - targets).abs() + 1e-4).square()  # the least errors cost most
    call = UnitCall((x,), {}, targets, grads, torch.zeros(50, dtype=torch.int64), 0, targets.numel(), True)
    objective = build_objective(dict(type="hessian", eliminate=eliminate, eliminate_by=eliminate_by))
    candidates = [Candidate(factor) for factor in (0.5, 0.8, 1.0, 1.1)]

    def errors(share):
        some = [call.by_importance().first(share)]
        ((_, found),) = candidate_errors(layer, some, layer, "input", candidates, objective)
        return found

    bounds = [errors(share) for share in SCREENS]
    assert all((bound <= errors(1.0)).all() for bound in bounds)
    assert float(bounds[-1].min()) > 0


def best(errors, expected=None, eliminate=0.0):
    expected = errors.errors.clone() if expected is None else torch.tensor(expected, dtype=torch.float64)
    return best_candidate(errors, expected, eliminate, errors.masses, "layer").best


@pytest.mark.parametrize("mass", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("told", ["truth", "nonsense", "nothing", "broken"])
def test_exact_whatever_is_expected(told, mass):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        known = torch.rand(100, generator=generator).add(1).tolist()
        expected = {"truth": known, "nonsense": known[::-1], "nothing": [1.0] * 100, "broken": [NAN, 0.0] * 50}[told]
        errors = Errors(known, mass)
        hoped = dict.fromkeys(SCREENS, 1.0) if told == "nonsense" else errors.masses
        choice = best_candidate(errors, torch.tensor(expected, dtype=torch.float64), 0.1, hoped, "layer")
        assert choice.best == known.index(min(known))


def test_screening_spares_full_evaluations():
    curve = [1 + ((i - 40) / 20) ** 2 for i in range(100)]
    screened, unscreened = Errors(curve), Errors(curve)
    assert best(screened) == 40
    assert best(unscreened, eliminate=0.5) == 40  # half is dropped: nothing can be screened
    assert screened.cost < 0.4 * unscreened.cost
    assert unscreened.cost == 100


def test_the_number_of_candidates_that_are_left_is_told():
    left = []
    curve = Errors([1 + ((i - 40) / 20) ** 2 for i in range(100)])
    best_candidate(curve, curve.errors, 0.0, curve.masses, "layer", told=left.append)
    assert left == sorted(left, reverse=True)
    assert left[0] == 99  # the one that seems best has been evaluated before the first screen
    assert 0 < left[-1] < 30


def test_no_screen_where_none_would_pay():
    flat = Errors([1 + i / 10000 for i in range(100)])
    assert best(flat) == 0
    assert flat.shares == [1.0]


def test_what_was_found_tells_the_next_search_which_screens_pay():
    flat = Errors([1 + i / 10000 for i in range(100)])
    choice = best_candidate(flat, torch.arange(1.0, 101.0).double(), 0.0, flat.masses, "layer")  # seems steep
    assert len(flat.shares) > 1
    flat.shares.clear()
    assert best_candidate(flat, choice.expected, 0.0, flat.masses, "layer").best == 0
    assert flat.shares == [1.0]


def test_a_screen_that_leaves_nothing_ends_the_search():
    errors = Errors([100.0] * 20 + [1.0] + [100.0] * 20)
    assert best(errors) == 20
    assert errors.cost < 2


def test_the_first_of_several_that_tie():
    assert best(Errors([2.0] * 30 + [1.0] * 20)) == 30
    assert best(Errors([2.0, 1.0, 1.0])) == 1
    assert TOGETHER > 3


def test_a_bound_that_rounding_alone_lifts_above_the_least_error_excludes_nothing():
    errors = Errors([2.0] * 5 + [1.0, 2.0, 1.0] + [2.0] * 20)
    errors.masses = dict.fromkeys(SCREENS, 1 + 5e-4)
    assert best(errors, expected=[3.0] * 7 + [1.0] + [3.0] * 20) == 5
    assert errors.cost < 20  # it was screened


def test_errors_that_are_all_the_same_choose_nothing():
    """Such as those of a layer whose gradient is zero: its lowest factor would clip it for nothing."""
    assert best(Errors([0.0] * 41)) is None
    assert best(Errors([2.0, 2.0])) is None
    assert best(Errors([0.0] * 40 + [1.0])) == 0


def test_nan_is_never_best_and_all_nan_is_an_error():
    assert best(Errors([NAN] * 20 + [3.0] + [NAN] * 20)) == 20
    assert best(Errors([INF] * 20 + [3.0] + [NAN] * 20), [1.0] * 41) == 20
    for bad in (NAN, INF):
        with pytest.raises(CalibrationError, match="layer: the error of every candidate"):
            best(Errors([bad] * 41))


def test_sums_are_added_in_the_order_of_the_images_whichever_process_has_them(monkeypatch):
    column = {image: torch.tensor([value]).double().numpy() for image, value in ((0, 1e16), (8, -1e16), (16, 1.0))}
    parts = [[(image, column[image]) for image in images] for images in ((0, 16), (8,))]
    monkeypatch.setattr("apq_mmdet.calibration.scoring.gather", lambda own: parts)
    assert sum_by_image([], 1).tolist() == [1.0]  # 1e16 + 1 is 1e16 in float64
