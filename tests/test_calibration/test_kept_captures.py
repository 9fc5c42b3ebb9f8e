"""What a calibration holds of its images: nothing of blocks that are finished, but for what later ones run on."""

import pytest
import torch
from helpers import build_swin, recipe, short_grids

from apq_mmdet.calibration import calibrate, calibrator
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.layers import quantize_model

IMAGES = [torch.randn(1, 3, 57, 41), torch.randn(1, 3, 33, 64)]
SEARCH = dict(grids=short_grids(3), rounds=1)
# of everything that keeps something beside the captured calls
SETTINGS = {
    "layers": lambda: recipe("ptq4vit", search=SEARCH),
    "shortlist": lambda: recipe("apq", search=SEARCH | dict(shortlist=2)),
    "inputs from quantized blocks": lambda: recipe("qwt", search=SEARCH),
    "refit": lambda: recipe("aphq", mlp_refit=True, reconstruction=None, search=SEARCH),
}


class Kept(dict):
    """States of finished blocks, in memory."""

    load = dict.get

    def save(self, block, finished):
        self[block] = finished


def block_of(key):
    """The block that a key of the store belongs to."""
    while isinstance(key, tuple):
        key = key[0]
    return key


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_finished_blocks_leave_nothing_but_what_later_ones_run_on(name, resumed, monkeypatch):
    stores, left, states = [], [], Kept()

    class Store(CaptureStore):
        def __init__(self, *args):
            super().__init__(*args)
            stores.append(self)

    def note():
        left.append([key for key in stores[-1]._structure if block_of(key) != "teacher"])

    settings = SETTINGS[name]()
    if resumed:
        model = build_swin(depth=1)
        quantize_model(model, settings.policy)
        calibrate(model, IMAGES, settings, states=states)
    monkeypatch.setattr(calibrator, "CaptureStore", Store)
    monkeypatch.setattr(calibrator, "release_freed", note)
    model = build_swin(depth=1)
    quantize_model(model, settings.policy)
    report = calibrate(model, IMAGES, settings, states=states)
    assert [block.resumed for block in report.blocks] == [resumed] * len(report.blocks)
    *_, captured = left[: len(IMAGES)]
    assert {block_of(key) for key in captured} == {block.block for block in report.blocks}
    for number, keys in enumerate(left[len(IMAGES) :], 1):
        finished = {block.block for block in report.blocks[:number]}
        kept = [key for key in keys if block_of(key) in finished and key[-1] != "quantized"]
        assert kept == []
    assert number == len(report.blocks)
