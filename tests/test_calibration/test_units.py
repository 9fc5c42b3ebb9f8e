import math
from dataclasses import replace

import pytest
import torch
from helpers import build_swin, recipe
from mmdet.models.backbones.swin import SwinBlock
from mmdet.models.layers import PatchEmbed, PatchMerging
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from mmdet.models.roi_heads.mask_heads import HTCMaskHead
from torch import nn

from apq_mmdet.calibration.blocks import BlockCall, partition, tensors_of
from apq_mmdet.calibration.distributed import SHARD
from apq_mmdet.calibration.store import TensorStore
from apq_mmdet.calibration.units import (
    SCREENS,
    TILE_ELEMENTS,
    UnitCalls,
    batches,
    rows_of,
    scattered,
    to_units,
    unit_module,
)
from apq_mmdet.layers import float_only, quantize_model


def block_call(block, args, image=0):
    with torch.no_grad():
        output = tensors_of(block(*args))[0]
    return BlockCall(args, {}, [output], [torch.randn_like(output)], image)


def swin_block(index):
    swin = build_swin()
    quantize_model(swin, recipe("minmax").policy)
    return list(partition(swin).values())[1 + index]


@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
@pytest.mark.parametrize("shape", [(14, 21), (13, 9), (7, 7), (3, 5)])
@pytest.mark.parametrize("images", [1, 2])
def test_windows_give_the_output_of_the_block(index, shape, images):
    block = swin_block(index)
    with float_only(block), torch.no_grad():
        call = block_call(block, (torch.randn(images, shape[0] * shape[1], 8), shape))
        view, units = unit_module(block), to_units(block, call)
        got = rows_of([view(*units.args)], len(units.targets))
        assert torch.allclose(got, units.targets, atol=1e-5)
        assert units.elements == call.outputs[0].numel() == units.targets.numel() - int(units.padding.sum())
        energy = units.grads.square().sum(1)
        assert torch.equal(energy, energy.sort(descending=True).values)
        assert float(units.grads.square().sum()) == pytest.approx(float(call.grads[0].square().sum()), rel=1e-5)


def test_the_mask_of_shifted_windows_matters():
    """Fails if regions are kept apart wrongly or not at all."""
    block = swin_block(1)
    with float_only(block), torch.no_grad():
        view, units = unit_module(block), to_units(block, block_call(block, (torch.randn(1, 14 * 14, 8), (14, 14))))
        x, region, valid = units.args
        assert len(region.unique()) == 9
        together = rows_of([view(x, torch.zeros_like(region), valid)], len(units.targets))
        assert not torch.allclose(together, units.targets, atol=1e-3)


@pytest.mark.parametrize(
    ("block", "args"),
    [
        (PatchMerging(8, 16), (torch.randn(1, 13 * 9, 8), (13, 9))),
        (PatchMerging(8, 16), (torch.randn(3, 13 * 9, 8), (13, 9))),
        (PatchEmbed(3, 8, kernel_size=4, stride=4, norm_cfg=dict(type="LN")), (torch.randn(1, 3, 33, 42),)),
        (PatchEmbed(3, 8, kernel_size=4, stride=4, norm_cfg=dict(type="LN")), (torch.randn(2, 3, 33, 42),)),
        (PatchEmbed(3, 8, kernel_size=3, stride=2, padding=1), (torch.randn(1, 3, 32, 32),)),  # patches overlap
    ],
)
def test_patches_give_the_output_of_the_block(block, args):
    with torch.no_grad():
        call = block_call(block, args)
        view, units = unit_module(block), to_units(block, call)
        got = rows_of(tensors_of(view(*units.args)), len(units.targets))
    assert torch.allclose(got, units.targets, atol=1e-5)
    assert units.separable == (block.__class__ is PatchMerging or not any(block.projection.padding))


def test_batches_stack_neighbouring_images_and_keep_them_apart():
    block = swin_block(0)
    calls = UnitCalls(TensorStore(memory=2**20), "b")
    with float_only(block):
        for image, side in zip((0, 1, 2, 3, SHARD, SHARD + 1), (14, 14, 21, 21, 14, 14), strict=True):
            calls.add(to_units(block, block_call(block, (torch.randn(1, side * side, 8), (side, side)), image)))
    found = list(batches(calls))
    assert [[c.image for c in b.calls] for b in found] == [[0, 1, 2, 3], [SHARD, SHARD + 1]]
    assert found[0].lengths == (4, 4, 9, 9)
    start = 0
    for call, length in zip(found[0].calls, found[0].lengths, strict=True):
        assert torch.equal(found[0].stacked.targets[start : start + length], call.targets)
        assert torch.equal(found[0].stacked.args[0][start : start + length], call.args[0])
        start += length
    covered = [(start, stop) for start, stop, _ in found[0].tiles()]
    assert covered[0][0] == 0
    assert covered[-1][1] == 26
    assert all(b.stacked.targets.numel() <= TILE_ELEMENTS for b in found)


def test_batches_stack_like_calls_of_a_shard_and_leave_big_ones_alone():
    block = swin_block(0)
    sides = [14, 13, 14, 266, 13, 266]  # 13 is padded, which takes another argument; 266 fills more than a tile
    calls = UnitCalls(TensorStore(memory=2**30), "b")
    with float_only(block):
        for image, side in enumerate(sides):
            calls.add(to_units(block, block_call(block, (torch.randn(1, side * side, 8), (side, side)), image)))
    found = [[call.image for call in batch.calls] for batch in batches(calls)]
    assert found == [[3], [5], [0, 2], [1, 4]]


def test_units_without_gradients_come_scattered_and_count_alike():
    block = swin_block(0)
    x = torch.randn(1, 56 * 56, 8)
    with float_only(block):
        call = replace(block_call(block, (x, (56, 56)), 0), grads=None)
    units = to_units(block, call)  # 64 windows
    assert units.grads is None
    weighed = to_units(block, replace(call, grads=[torch.ones_like(x)]))  # all alike: windows in the image's order
    places = [int((weighed.args[0] == window).flatten(1).all(1).nonzero()) for window in units.args[0]]
    assert sorted(places) == list(range(64))
    assert places != sorted(places)
    calls = UnitCalls(TensorStore(memory=2**30), "b")
    calls.add(units)
    assert calls.masses() == {share: math.ceil(share * 64) / 64 for share in SCREENS}
    assert calls[0].grads is None


@pytest.mark.parametrize("weighed", [True, False])
def test_a_sample_of_tokens_is_spread_over_the_units(weighed):
    block = swin_block(1)
    x = torch.randn(1, 50 * 56, 8)  # padded to 8 x 8 windows
    with float_only(block):
        call = block_call(block, (x, (50, 56)), 0)
        units = to_units(block, call if weighed else replace(call, grads=None))
        sample = units.sampled(tokens=1000, seed=0)  # 20 of 64 windows
        got = rows_of([unit_module(block)(*sample.args)], len(sample.targets))
    assert torch.allclose(got, sample.targets, atol=1e-5)  # arguments and targets of the same windows
    places = [int((units.targets == target).all(1).nonzero()[0]) for target in sample.targets]
    assert len(set(places)) == 20
    assert places == sorted(places)  # the most important ones first
    assert sample.elements == sample.targets.numel() - int(sample.padding.sum()) < units.elements
    assert torch.equal(sample.targets, units.sampled(tokens=1000, seed=0).targets)
    for other in (units.sampled(tokens=1000, seed=1), replace(units, image=1).sampled(tokens=1000, seed=0)):
        assert not torch.equal(sample.targets, other.targets)
    for tokens in (0, 64 * 49, 10**6):
        assert units.sampled(tokens, seed=0) is units
    assert len(units.sampled(tokens=1, seed=0).targets) == 1
    whole = to_units(nn.Linear(8, 8), BlockCall((x,), {}, [x], None, 0))
    assert whole.sampled(tokens=1, seed=0) is whole  # it cannot be taken apart


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (12, 12), (29, 48)])
def test_a_part_of_a_scattered_order_comes_from_everywhere(rows, columns):
    number = rows * columns
    order = scattered(number)
    assert sorted(order.tolist()) == list(range(number))
    for part in (order[: number // 4], order[order[: number // 4]]):  # of one that was scattered already, too
        for places, most in ((part // columns, rows), (part % columns, columns)):
            quarters = torch.bincount(4 * places // most, minlength=4) / len(part)
            assert float(quarters.min()) > 0.05, (rows, columns)


def test_whole_calls_are_screened_by_their_gradients():
    block = nn.Conv2d(1, 1, 3)
    calls = UnitCalls(TensorStore(), "b")
    for image, size in enumerate((1.0, 5.0, 3.0)):
        x = torch.randn(1, 1, 5, 5)
        calls.add(to_units(block, BlockCall((x,), {}, [x], [size * torch.ones_like(x)], image)))
    assert [c.image for c in calls.most_important(0.3)] == [1]
    assert [c.image for c in calls.most_important(0.5)] == [1, 2]
    assert [c.image for c in calls.most_important(1.0)] == [0, 1, 2]
    assert calls.masses() == {share: 25 / 35 if share <= 0.3 else 34 / 35 for share in SCREENS}


def test_room_is_needed_for_every_call_by_its_size(monkeypatch):
    calls = UnitCalls(TensorStore(), "b")
    for image, rows in enumerate((1, 3)):
        x = torch.zeros(rows, 4)
        calls.add(to_units(nn.Linear(4, 4), BlockCall((x,), {}, [x], [x], image)))
    monkeypatch.setattr(TensorStore, "room", 100)
    assert calls.has_room_for(25)  # of the first call; the other one takes three times as much
    assert not calls.has_room_for(26)
    assert UnitCalls(TensorStore(), "none").has_room_for(101)


def test_empty_calls_say_nothing():
    calls = UnitCalls(TensorStore(), "b")
    x = torch.zeros(0, 4)
    calls.add(to_units(nn.Linear(4, 4), BlockCall((x,), {}, [x], [x], 0)))
    assert len(calls) == 0


def test_heads_without_rois_say_nothing_and_keyword_arguments_keep_their_names():
    head = Shared2FCBBoxHead(in_channels=2, roi_feat_size=2, fc_out_channels=4, num_classes=3)
    calls = UnitCalls(TensorStore(memory=10**6), "b")
    for image, number in enumerate((0, 3)):
        x = torch.randn(number, 2, 2, 2)
        outputs = list(head(x))
        calls.add(to_units(head, BlockCall((), {"x": x}, outputs, outputs, image)))
    assert [(c.image, tuple(c.targets.shape)) for c in calls] == [(1, (3, 4 + 3 * 4))]
    mask_head = HTCMaskHead(num_convs=1, in_channels=2, conv_out_channels=2, num_classes=3)
    x = torch.randn(2, 2, 2, 2)
    with torch.no_grad():
        output = mask_head(x, return_feat=False)
        output = output[0] if isinstance(output, (list, tuple)) else output
        view, units = (
            unit_module(mask_head),
            to_units(mask_head, BlockCall((x,), {"return_feat": False}, [output], [output], 0)),
        )
        assert torch.equal(rows_of(tensors_of(view(*units.args, **units.kwargs)), len(units.targets)), units.targets)


@pytest.mark.parametrize("images", [1, 2])
def test_only_what_mmdet_itself_computes_is_taken_apart(images):
    class Scaled(SwinBlock):
        def forward(self, x, hw_shape):
            return 2 * super().forward(x, hw_shape)

    for cls in (SwinBlock, Scaled):
        block = cls(8, 2, 16)
        x = torch.randn(images, 49, 8)
        units = to_units(block, BlockCall((x, (7, 7)), {}, [x], [x], 0))
        assert units.separable == (cls is SwinBlock)
        assert units.targets.numel() == x.numel()


def test_an_output_with_one_number_for_each_unit_is_a_column():
    numbers, pairs = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([[4.0, 5.0], [6.0, 7.0], [8.0, 9.0]])
    assert rows_of([numbers], 3).tolist() == [[1], [2], [3]]
    assert rows_of([pairs, numbers], 3).tolist() == [[4, 5, 1], [6, 7, 2], [8, 9, 3]]
    assert rows_of([numbers], 1).tolist() == [[1, 2, 3]]
