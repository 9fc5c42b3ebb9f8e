"""The benchmarks of the search, on a small Swin block in place of a captured one."""

import contextlib
import json
import sys
from argparse import Namespace
from collections import Counter

import pytest
import search_means
import search_speed
import time_shares
import torch
from helpers import build_swin, observed, recipe

from apq_mmdet.calibration import scoring, search
from apq_mmdet.calibration.blocks import BlockCall, partition
from apq_mmdet.layers import integer, quantize_model, quantized_layers

NAME = "stages.0.blocks.1"


@pytest.fixture
def captured():
    """What ``search_speed.capture`` gives: a block whose ranges are observed, and its calls on two images."""
    swin = build_swin()
    quantize_model(swin, recipe("apq").policy)
    block = partition(swin)[NAME]
    inputs = [(torch.randn(1, 9 * 15, 8), (9, 15)) for _ in range(2)]
    outputs = observed(block, inputs)
    calls = [
        BlockCall(args, {}, [output], [torch.randn_like(output)], image)
        for image, (args, output) in enumerate(zip(inputs, outputs, strict=True))
    ]
    return {NAME: (block, calls)}


@pytest.mark.parametrize("metric", ["module", "block"])
def test_search_and_plain_loop_choose_alike(captured, metric):
    block, calls = captured[NAME]
    found = search_speed.compare(block, calls, metric, Namespace(candidates=4, short=4, plain_samples=1))
    assert found["choices_that_differ_on_the_short_grid"] == {}
    assert set(found["times_faster_by_layer"]) == set(dict(quantized_layers(block)))
    assert found["images"] == 2


def test_a_search_that_chooses_otherwise_is_told(captured, monkeypatch):
    block, calls = captured[NAME]
    found = search_speed.ours

    def broken(*args):
        chosen, seconds = found(*args)
        return {**chosen, "ffn.layers.1.input": 0.25}, seconds

    monkeypatch.setattr(search_speed, "ours", broken)
    told = search_speed.compare(block, calls, "module", Namespace(candidates=2, short=2, plain_samples=1))
    assert list(told["choices_that_differ_on_the_short_grid"]) == ["ffn.layers.1.input"]


def test_the_search_without_one_of_its_means_chooses_alike(captured, monkeypatch):
    block, calls = captured[NAME]
    evaluated, error_of = Counter(), search.candidate_errors
    monkeypatch.setattr(
        search, "candidate_errors", lambda *args: evaluated.update({"all": len(args[4])}) or error_of(*args)
    )
    found = search_means.compare(block, calls, "block", 12)
    assert found["choices_that_differ_without"] == []
    assert list(found["times_slower_without"]) == list(search_means.MEANS)
    counts = {}
    for name, without in search_means.MEANS.items():
        evaluated.clear()
        with without():
            search_speed.ours(block, calls, search_speed.config("block", 12))
        counts[name] = evaluated["all"]
    evaluated.clear()
    search_speed.ours(block, calls, search_speed.config("block", 12))
    assert counts["fixpoint"] >= evaluated["all"] > 0
    assert counts["prefix"] == counts["tiles"] == counts["integer products"] == evaluated["all"]
    assert counts["screening"] > evaluated["all"] / 2
    with search_means.MEANS["screening"]():
        assert scoring._next_screen(torch.ones(100), {0.1: 1.0}) is None
    assert scoring._next_screen(torch.tensor([1.0] + [9.0] * 99), {0.1: 1.0}) == 0.1
    layer = block.ffn.layers[1]
    for without, mode in ((contextlib.nullcontext, "CODES"), (search_means.MEANS["integer products"], "QUANTIZE")):
        with without():
            search._join(layer)
        assert {quantizer.mode.name for quantizer in layer.quantizers.values()} == {mode}
    slot = search_means.Slot("layer", block, "weight")
    with search_means.MEANS["fixpoint"]():
        slot.searched_at = 7
        assert slot.searched_at == -1


def test_shares_of_time_are_written(captured, monkeypatch, tmp_path):
    operations = set()
    for units in {integer.INT8_UNITS, False}:  # products on int8 units count like any others
        monkeypatch.setattr(integer, "INT8_UNITS", units)
        operations.add(gemm_operations(captured, monkeypatch, tmp_path))
    assert len(operations) == 1


def gemm_operations(captured, monkeypatch, tmp_path):
    out = tmp_path / "shares.json"
    monkeypatch.setattr(time_shares, "capture", lambda args: captured)
    monkeypatch.setattr(time_shares, "rates", lambda: (1e9, 1e9))
    line = ["time_shares.py", "float.py", "float.pth", "--candidates", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", line)
    time_shares.main()
    (row,) = json.loads(out.read_text())["blocks"]
    assert row["block"] == NAME
    assert row["gemm_operations"] > 0
    assert row["bytes_written"] > 0
    assert min(row["share"].values()) > 0
    assert row["share_other"] >= 0
    assert row["times_the_floor"] > 0
    return row["gemm_operations"]
