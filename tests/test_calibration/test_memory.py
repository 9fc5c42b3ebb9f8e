import platform
from pathlib import Path

import pytest
import torch
from helpers import build_swin, recipe, short_grids

from apq_mmdet.calibration import FeatureTask, calibrate, calibrator, importance, memory
from apq_mmdet.calibration.blocks import partition
from apq_mmdet.calibration.memory import peak_memory, release_freed
from apq_mmdet.calibration.store import CaptureStore
from apq_mmdet.layers import quantize_model


def resident():
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_peak_is_what_the_process_had_at_most():
    assert 1e8 < peak_memory()["host_bytes"] < 1e12


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have their own ways")
def test_freed_memory_below_what_is_held_goes_back_to_the_system():
    tensors = [torch.ones(12_500) for _ in range(4000)]  # 200 MB in pieces that are not mapped one by one
    last = tensors[-1]  # keeps the heap from shrinking
    del tensors
    before = resident()
    release_freed()
    assert before - resident() > 150e6
    assert float(last.sum()) == 12_500


def test_calibration_releases_after_every_image_of_both_passes_and_every_block(monkeypatch):
    released = []
    for module in (calibrator, importance):
        monkeypatch.setattr(module, "release_freed", lambda name=module.__name__: released.append(name))
    settings = recipe("apq", search=dict(grids=short_grids(2), rounds=1))
    model = build_swin()
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(1, 3, 33, 64) for _ in range(3)], settings, FeatureTask())
    blocks = len(partition(model))
    assert released == [calibrator.__name__] * 3 + [importance.__name__] * 3 + [calibrator.__name__] * blocks


def test_an_eighth_of_the_budget_holds_what_is_captured(monkeypatch):
    held = []

    class Told(CaptureStore):
        def __init__(self, parent, memory):
            held.append(memory)
            super().__init__(parent, memory)

    monkeypatch.setattr(calibrator, "CaptureStore", Told)
    model, settings = build_swin(), recipe("minmax")
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(1, 3, 33, 64)], settings, memory_budget=8000)
    assert held == [1000]


def test_where_the_system_does_not_tell_the_peak_there_is_none(monkeypatch):
    """Windows has no such module."""
    monkeypatch.setattr(memory, "resource", None)
    assert memory.peak_memory()["host_bytes"] is None
