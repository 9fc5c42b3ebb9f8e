"""What a person sees on the progress bar of a search, as it is drawn while the search runs."""

import pytest

from apq_mmdet.calibration import progress
from apq_mmdet.calibration.progress import SearchBar


@pytest.fixture
def seen(capsys, monkeypatch):
    """What was drawn last."""
    monkeypatch.setattr(progress, "INTERVAL", 0.0)
    return lambda: capsys.readouterr().err.split("\r")[-1]


def test_a_person_sees_block_layer_candidates_and_memory(seen):
    with SearchBar({"first": 2, "second": 4}, shown=True) as bar:
        bar.begin("first")
        bar.quantizer("layer.weight")
        bar.finish()  # one of its two searches was not needed
        bar.begin("second")
        bar.quantizer("layer.input")
        assert "second layer.input:  33%" in (shown := seen())
        assert "2/6" in shown
        assert "peak memory" in shown
        bar.left(37, "candidates")
        assert "37 candidates left, peak memory" in seen()
        bar.quantizer("layer.weight")
        assert "3/6" in (shown := seen())
        assert "second layer.weight" in shown
        assert "candidates" not in shown  # those of the search before


def test_what_follows_the_search_is_named_and_not_counted(seen):
    with SearchBar({"first": 1}, shown=True) as bar:
        bar.begin("first")
        bar.quantizer("layer.weight")
        bar.stage("compensation")
        assert "first compensation" in (shown := seen())
        assert "1/1" in shown
        bar.stage("reconstruction")
        bar.left(7, "iterations")
        assert "7 iterations left" in (shown := seen())
        assert "1/1" in shown


def test_candidates_that_are_judged_fast_are_not_all_drawn(capsys, monkeypatch):
    monkeypatch.setattr(progress, "INTERVAL", 1000.0)
    with SearchBar({"first": 1}, shown=True) as bar:
        bar.begin("first")
        bar.quantizer("layer.weight")
        for number in range(99):
            bar.left(number, "candidates")
    assert "candidates left" not in capsys.readouterr().err


def test_other_processes_show_nothing(capsys):
    with SearchBar({"first": 1}, shown=False) as bar:
        bar.begin("first")
        bar.quantizer("layer")
        bar.left(3, "iterations")
        bar.finish()
    assert capsys.readouterr().err == ""
