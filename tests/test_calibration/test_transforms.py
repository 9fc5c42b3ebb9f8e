import copy

import pytest
import torch
from helpers import build_swin, recipe
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.transforms import (
    MOST,
    NormRescaling,
    QueryKeyRescaling,
    ValueRescaling,
    balancing_factors,
    channel_extents,
    rescalings_of,
)
from apq_mmdet.layers import float_only, quantize_model


def test_factors_by_hand():
    # geometric mean of 1, 4, 16 is 4; zero, infinite and NaN channels stay and do not count
    imbalance = torch.tensor([1.0, 4.0, 16.0, 0.0, float("inf"), float("nan")])
    full = torch.tensor([0.25, 1.0, 4.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    assert torch.allclose(balancing_factors(imbalance, 1.0), full)
    assert torch.allclose(balancing_factors(imbalance, 0.5), full.sqrt())
    assert torch.equal(balancing_factors(imbalance, 0.0), torch.ones(6, dtype=torch.float64))


def test_factors_are_bounded():
    factors = balancing_factors(torch.tensor([1e-12, 1e12]), 1.0)
    assert factors.tolist() == pytest.approx([1 / MOST, MOST])
    assert balancing_factors(torch.zeros(3), 1.0).tolist() == [1, 1, 1]


def test_norm_by_hand():
    norm, linear = nn.LayerNorm(2), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 3.0]))
        norm.bias.copy_(torch.tensor([4.0, 5.0]))
        linear.weight.copy_(torch.tensor([[6.0, 7.0]]))
    NormRescaling("norm", norm, linear).divide(torch.tensor([2.0, 0.5]))
    assert norm.weight.tolist() == [1.0, 6.0]
    assert norm.bias.tolist() == [2.0, 10.0]
    assert linear.weight.tolist() == [[12.0, 3.5]]


def test_query_key_and_value_rows_by_hand():
    qkv, proj = nn.Linear(1, 6), nn.Linear(2, 1)  # one head of two channels, or two of one
    with torch.no_grad():
        for p in (qkv.weight, qkv.bias, proj.weight):
            p.fill_(1.0)
    QueryKeyRescaling("qk", qkv, None).divide(torch.tensor([2.0, 4.0]))
    assert qkv.weight.flatten().tolist() == qkv.bias.tolist() == [0.5, 0.25, 2.0, 4.0, 1.0, 1.0]
    ValueRescaling("v", qkv, proj, None).divide(torch.tensor([2.0, 4.0]))
    assert qkv.weight.flatten().tolist() == qkv.bias.tolist() == [0.5, 0.25, 2.0, 4.0, 0.5, 0.25]
    assert proj.weight.flatten().tolist() == [2.0, 4.0]


def test_layers_without_bias():
    qkv, proj = nn.Linear(1, 6, bias=False), nn.Linear(2, 1)
    with torch.no_grad():
        qkv.weight.fill_(1.0), proj.weight.fill_(1.0)
    QueryKeyRescaling("qk", qkv, None).divide(torch.tensor([2.0, 4.0]))
    ValueRescaling("v", qkv, proj, None).divide(torch.tensor([2.0, 4.0]))
    assert qkv.weight.flatten().tolist() == [0.5, 0.25, 2.0, 4.0, 0.5, 0.25]
    assert proj.weight.flatten().tolist() == [2.0, 4.0]


def test_spans_by_hand():
    low = torch.tensor([-1.0, 1.0, -2.0, -3.0, -5.0, 0.0])
    high = torch.tensor([2.0, 3.0, -1.0, 1.0, 4.0, 6.0])
    qkv, norm = nn.Linear(1, 6), nn.LayerNorm(6)
    # zero belongs to every range: 1..3 and -2..-1 count from zero
    assert NormRescaling("n", norm, qkv).imbalance(low, high).tolist() == [3, 3, 2, 4, 9, 6]
    place = QueryKeyRescaling("qk", qkv, None)
    assert {role: s.tolist() for role, s in place.spans(low, high).items()} == {"query": [2, 3], "key": [2, 3]}
    assert ValueRescaling("v", qkv, nn.Linear(2, 1), None).imbalance(low, high).tolist() == [5, 6]
    assert place.imbalance(torch.zeros(6), torch.tensor([8.0, 1.0, 2.0, 4.0, 0.0, 0.0])).tolist() == [2.0, 0.5]


def test_extents_are_over_all_runs_and_need_no_hook_afterwards():
    norm, linear = nn.LayerNorm(3), nn.Linear(3, 9)
    places = [NormRescaling("n", norm, linear), QueryKeyRescaling("qk", linear, None)]
    inputs = [torch.randn(2, 4, 3), torch.randn(5, 3), torch.randn(0, 3)]

    def run():
        for x in inputs:
            linear(x)

    (low, high), (out_low, out_high) = channel_extents(places, run)
    rows = torch.cat([x.reshape(-1, 3) for x in inputs])
    assert torch.equal(low, rows.amin(0).double())
    assert torch.equal(high, rows.amax(0).double())
    outputs = linear(rows).detach()
    assert torch.allclose(out_low.float(), outputs.amin(0))
    assert torch.allclose(out_high.float(), outputs.amax(0))
    assert not linear._forward_hooks


def test_unknown_blocks_have_no_rescalings():
    assert rescalings_of(nn.Linear(2, 2)) == []


def share_between_blocks(swin, first, second):
    second.norm1 = first.norm1
    return first.norm1


def share_within_a_block(swin, first, second):
    first.norm2 = first.norm1
    return first.norm1


def share_with_the_model(swin, first, second):
    swin.norm0 = second.norm2  # of its output
    return second.norm2


def share_a_parameter(swin, first, second):
    second.norm1.bias = first.norm1.bias
    return first.norm1


@pytest.mark.parametrize("share", [share_between_blocks, share_within_a_block, share_with_the_model, share_a_parameter])
def test_a_norm_that_has_other_users_stays_as_it_is(share):
    model, x = build_swin(), torch.randn(1, 3, 40, 40)
    first, second = model.stages[0].blocks
    norm = share(model, first, second)
    before, norm_before = copy.deepcopy((model, norm))
    settings = recipe("repq")
    quantize_model(model, settings.policy)
    calibrate(model, [x], settings)
    with torch.no_grad(), float_only(model):
        for got, want in zip(model(x), before(x), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(norm.weight, norm_before.weight)
    assert torch.equal(norm.bias, norm_before.bias)
    for block, old in zip((first, second), before.stages[0].blocks, strict=True):
        rows, old_rows = (b.attn.w_msa.qkv.weight.chunk(3)[0] for b in (block, old))
        assert not torch.equal(rows, old_rows)  # query is made even against key
    changed = [not torch.equal(a.weight, b.weight) for a, b in zip(norms(model), norms(before), strict=True)]
    assert sum(changed) >= 2  # the other norms of blocks


def share_behind_a_norm(first, second):
    second.ffn.layers[0][0].weight = first.ffn.layers[0][0].weight
    return r"re:.*ffn\.layers\.0\.0"


def share_qkv(first, second):
    second.attn.w_msa.qkv = first.attn.w_msa.qkv
    return "*qkv"


def share_projection(first, second):
    second.attn.w_msa.proj.weight = first.attn.w_msa.proj.weight
    return "*proj"


@pytest.mark.parametrize("share", [share_behind_a_norm, share_qkv, share_projection])
def test_a_float_layer_that_has_other_users_stays_as_it_is(share):
    """Of two blocks each would multiply it by factors of its own."""
    model, x = build_swin(), torch.randn(1, 3, 40, 40)
    overrides = dict(shared=dict(pattern=share(*model.stages[0].blocks), float=True))
    before = copy.deepcopy(model)
    settings = recipe("repq", overrides=overrides)
    quantize_model(model, settings.policy)
    calibrate(model, [x], settings)
    with torch.no_grad(), float_only(model):
        for got, want in zip(model(x), before(x), strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def norms(swin):
    return [norm for block in swin.stages[0].blocks for norm in (block.norm1, block.norm2)]
