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


def test_what_follows_the_search_is_named_and_counted(seen):
    with SearchBar({"first": 1 + 4 + 60}, shown=True) as bar:
        bar.begin("first")
        bar.quantizer("layer.weight")
        bar.stage("compensation", 4)
        assert "first compensation" in (shown := seen())
        assert "1/65" in shown
        bar.stage("reconstruction", 60)
        assert "5/65" in seen()
        bar.left(205, "iterations")
        assert "205 iterations left" in (shown := seen())
        assert "44/65" in shown
        bar.finish()
    assert "65/65" in seen()


def test_blocks_of_an_earlier_run_say_nothing_of_the_speed(seen, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    with SearchBar({"kept": 1000, "next": 4}, shown=True) as bar:
        bar.begin("kept")
        bar.skip()
        bar.finish()
        bar.begin("next")
        bar.quantizer("a")
        now[0] = 10.0
        bar.quantizer("b")
        assert "1001/1004" in (shown := seen())
        assert "00:30" in shown  # three more, at ten seconds each


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
