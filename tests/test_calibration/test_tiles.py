"""What is computed tile by tile is what is computed at once."""

import pytest
import torch
from helpers import build_swin, recipe, short_grids

from apq_mmdet.calibration import calibrate, compensation, scoring, units, weight_errors
from apq_mmdet.layers import quantize_model

IMAGES = [torch.randn(1, 3, 57, 41), torch.randn(1, 3, 33, 64)]
SEARCH = dict(grids=short_grids(3), rounds=1)
PARTS = {  # of each recipe the part whose sums are looked at
    "qwt": dict(),
    "apq_plus": dict(compensation=dict(rounding=False, ranges=0), reconstruction=None),
    "brecq": dict(reconstruction=dict(weighting="hessian", iterations=1, batch=4)),
    "apq": dict(),
}


@pytest.fixture
def small(monkeypatch):
    """A function that makes tiles so small that every call takes many of them."""

    def make_small():
        monkeypatch.setattr(units, "TILE_ELEMENTS", 500)  # a window of 49 tokens has 392
        monkeypatch.setattr(scoring, "BUFFER_ELEMENTS", 2000)
        for module in (compensation, weight_errors):
            monkeypatch.setattr(module, "TOKENS", 7)

    return make_small


def calibrated(name):
    """The model's floats, and the objectives that reconstructions started from."""
    torch.manual_seed(3)
    settings = recipe(name, search=SEARCH, **PARTS[name])
    model = build_swin(depth=1)
    quantize_model(model, settings.policy)
    report = calibrate(model, IMAGES, settings)
    begun = [found["before"] for block in report.blocks for found in block.reconstructions]
    learned = name == "brecq"  # one step apart is one step apart: what it starts from is enough
    state = {} if learned else {k: v.double() for k, v in model.state_dict().items() if v.is_floating_point()}
    return state, torch.tensor(begun, dtype=torch.float64)


@pytest.mark.parametrize("name", PARTS)
def test_small_tiles_change_nothing(name, small):
    want, begun = calibrated(name)
    small()
    got, again = calibrated(name)
    assert want or len(begun)
    assert all(torch.allclose(got[key], want[key], rtol=1e-3, atol=1e-4) for key in want)
    assert torch.allclose(begun, again, rtol=1e-5)
