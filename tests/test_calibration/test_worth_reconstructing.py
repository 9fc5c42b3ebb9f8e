"""Which blocks a stage of reconstruction takes on."""

from dataclasses import replace

import pytest
from helpers import recipe
from test_reconstruction import QUICK, PowersOfTwo, linear, swin_block
from torch import nn

from apq_mmdet.calibration.reconstruction import worth_reconstructing
from apq_mmdet.layers import quantize_model


@pytest.mark.parametrize(("max_bits", "worth"), [(2, False), (3, True), (None, True)])
def test_blocks_of_many_bits_are_not_worth_it(max_bits, worth):
    view, _ = swin_block()
    assert worth_reconstructing(view, replace(QUICK, max_bits=max_bits)) is worth


@pytest.mark.parametrize(("max_bits", "worth"), [(2, False), (3, True), (8, True)])
def test_one_weight_of_few_bits_makes_a_block_worth_it(max_bits, worth):
    block = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    quantize_model(block, recipe("minmax", w_bits=8, overrides=dict(few=dict(pattern="1", bits=3))).policy)
    assert worth_reconstructing(block, replace(QUICK, max_bits=max_bits)) is worth


def test_blocks_without_anything_to_learn_are_not_worth_it():
    """A stage that learns steps has nothing to do where inputs are float, one that learns weights where those are."""
    steps, weights = replace(QUICK, rounding_lr=0.0), replace(QUICK, step_lr=0.0)
    for role, worth in (("input", (False, True)), ("weight", (True, False))):
        block = nn.Sequential(nn.Linear(4, 4))
        quantize_model(block, recipe("minmax", overrides=dict(mine={role: None})).policy)
        assert (worth_reconstructing(block, steps), worth_reconstructing(block, weights)) == worth


@pytest.mark.parametrize(
    ("others", "worth"), [((), True), (("weight",), True), (("input",), True), (("weight", "input"), False)]
)
def test_formats_that_are_not_linear_leave_nothing_to_learn(others, worth):
    block, _ = linear()
    for role in others:
        quantizer = block[0].quantizers[role]
        block[0].quantizers[role] = PowersOfTwo(3, quantizer.axis, quantizer.groups)
    assert worth_reconstructing(block, QUICK) is worth
