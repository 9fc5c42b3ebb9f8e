import torch
from helpers import in_processes, process_group
from torch.utils._pytree import tree_leaves

from apq_mmdet.calibration.minibatches import CALLS, Minibatches
from apq_mmdet.calibration.store import TensorStore
from apq_mmdet.calibration.units import UnitCall, UnitCalls


def marked(sizes, separable=True, width=2):
    """Calls whose units tell from which call and unit they are: 100 * call + unit in every tensor."""
    calls = UnitCalls(TensorStore(memory=2**20), "block")
    for image, units in enumerate(sizes):
        x = 100.0 * image + torch.arange(units).view(-1, 1).expand(-1, width)
        padding = torch.zeros(units, dtype=torch.int64)
        calls.add(UnitCall((x,), {"y": x + 0.5, "flag": True}, x, -x, padding, image, x.numel(), separable))
    return calls


def minibatches(calls, batch, seed=0):
    return Minibatches(calls, batch, torch.Generator().manual_seed(seed))


def test_every_unit_is_drawn_alike_and_comes_with_its_own_targets():
    draw = minibatches(marked([3, 5]), 6)
    counts = {}
    for _ in range(2000):
        (call,) = draw.draw()
        assert len(call.targets) == 6
        assert torch.equal(call.args[0], call.targets)
        assert torch.equal(call.kwargs["y"], call.targets + 0.5)
        assert torch.equal(call.grads, -call.targets)
        assert call.kwargs["flag"] is True
        for unit in call.targets[:, 0].tolist():
            counts[unit] = counts.get(unit, 0) + 1
    assert sorted(counts) == [0, 1, 2, 100, 101, 102, 103, 104]
    assert all(abs(count / 12000 - 1 / 8) < 0.01 for count in counts.values())


def test_the_seed_decides():
    first, again, other = (minibatches(marked([30, 50]), 8, seed).draw()[0].targets for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_whole_call_comes_alone():
    drawn = minibatches(marked([1, 1, 1], separable=False), 8).draw()
    assert len(drawn) == 1
    assert len(drawn[0].targets) == 1


def test_calls_that_cannot_be_stacked_stay_apart():
    calls = marked([40, 40])
    calls.add(marked([40], width=3)[0])
    draw = minibatches(calls, 2 * CALLS)
    drawn = [draw.draw() for _ in range(20)]
    assert {len(parts) for parts in drawn} >= {1, 2}
    assert all(sum(len(part.targets) for part in parts) == 2 * CALLS for parts in drawn)


def test_no_calls_give_no_units():
    assert minibatches(marked([]), 8).draw() == []


def work(rank: int, processes: int, port: int, folder: str) -> None:
    """One of several processes; the last one has no calls."""
    calls = marked([30, 50, 20])
    own = UnitCalls(TensorStore(memory=2**20), "own")
    for call in calls:
        if rank < processes - 1 and call.image % (processes - 1) == rank:
            own.add(call)
    with process_group(rank, processes, port):
        draw = minibatches(own, 8)
        torch.save([draw.draw()[0].tensors() for _ in range(5)], f"{folder}/{rank}.pth")


def test_all_processes_draw_what_one_does(tmp_path, free_port):
    in_processes(work, 3, free_port, str(tmp_path))
    draw = minibatches(marked([30, 50, 20]), 8)
    alone = [draw.draw()[0].tensors() for _ in range(5)]
    for rank in range(3):
        drawn = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        for one, other in zip(tree_leaves(drawn), tree_leaves(alone), strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
