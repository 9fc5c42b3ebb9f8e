import pytest
import torch

from apq_mmdet.calibration.scoring import SCREENS, TOGETHER, best_candidate
from apq_mmdet.errors import CalibrationError


class Errors:
    """Known errors; a share below 1 gives the share of them that the most important units make."""

    def __init__(self, errors, important=0.9):
        self.errors = torch.tensor(errors, dtype=torch.float64)
        self.important = important
        self.cost = 0.0

    def __call__(self, candidates, share):
        self.cost += len(candidates) * share
        return self.errors[candidates] * (1.0 if share == 1 else self.important * share / max(SCREENS))


@pytest.mark.parametrize("incumbent", [None, 0, 57])
@pytest.mark.parametrize("important", [0.0, 0.5, 0.99])
def test_exact_whatever_the_bounds_say(incumbent, important):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        errors = torch.rand(100, generator=generator).add(1).tolist()
        for screen in (True, False):
            got = best_candidate(Errors(errors, important), 100, 0.1, incumbent, "layer", screen)
            assert got.best == errors.index(min(errors))


def test_screening_spares_full_evaluations():
    curve = [1 + ((i - 40) / 20) ** 2 for i in range(100)]
    screened, unscreened = Errors(curve), Errors(curve)
    assert best_candidate(screened, 100, 0.1, None, "layer").best == 40
    assert best_candidate(unscreened, 100, 0.5, None, "layer").best == 40  # half is dropped: nothing can be screened
    assert screened.cost < 0.6 * unscreened.cost
    assert unscreened.cost == 100


def test_a_screen_that_leaves_nothing_ends_the_search():
    class OneGood(Errors):
        def __call__(self, candidates, share):
            assert candidates
            return super().__call__(candidates, share)

    assert best_candidate(OneGood([100.0] * 20 + [1.0] + [100.0] * 20), 41, 0.0, 20, "layer").best == 20


def test_the_first_of_several_that_tie():
    assert best_candidate(Errors([2.0] * 30 + [1.0] * 20), 50, 0.1, 45, "layer").best == 30
    assert best_candidate(Errors([2.0, 1.0, 1.0]), 3, 0.1, None, "layer").best == 1
    assert TOGETHER > 3


def test_nan_is_never_best_and_all_nan_is_an_error():
    nan = float("nan")
    assert best_candidate(Errors([nan] * 20 + [3.0] + [nan] * 20), 41, 0.1, 5, "layer").best == 20
    with pytest.raises(CalibrationError, match="layer: the error of every candidate"):
        best_candidate(Errors([nan] * 41), 41, 0.1, None, "layer")
