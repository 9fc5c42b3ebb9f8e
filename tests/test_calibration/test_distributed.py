"""Real processes (gloo): the result must not depend on their number."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.multiprocessing as mp
from helpers import build_swin, in_processes, process_group, recipe, short_grids

from apq_mmdet.calibration import calibrate, distributed, mlp_refit, units
from apq_mmdet.calibration.distributed import by_shard, own_images, refused_together, take_from_first
from apq_mmdet.errors import BadInputError, CalibrationError
from apq_mmdet.layers import packed_state_dict, quantize_model

SHARD = 3  # fewer than in use: as many shards with fewer images
IMAGES = 2 * SHARD + 2  # three shards
FEW = SHARD  # one shard: all but one process have no image
# recipe, bits of weights and of activations, images; apq_plus changes weights and, at 3 bits, measures tokens; aphq
# perturbs, refits MLPs and learns roundings softly; repq has quantiles
RUNS = [
    ("apq", 4, 4, IMAGES),
    ("apq_fast", 4, 4, IMAGES),
    ("apq_plus", 4, 3, IMAGES),
    ("apq_plus", 4, 4, FEW),
    ("qwt", 4, 4, IMAGES),
    ("aphq", 4, 4, FEW),
    ("repq", 4, 4, IMAGES),
]
DEALT = {1: 10, 2: 20, 3: None, 4: 40, 6: 60}  # values of shards: some are missing, one says nothing


@contextmanager
def small_shards() -> Iterator[None]:
    steps = patch.object(mlp_refit, "STEPS", 10)
    with patch.object(distributed, "SHARD", SHARD), patch.object(units, "SHARD", SHARD), steps:
        yield


def calibrated(name: str, w_bits: int, a_bits: int, images: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    grids = short_grids(9 if name == "apq" else 3)  # more than eight candidates are screened
    changes = {
        "apq_plus": dict(reconstruction=dict(rounding="straight_through", iterations=20)),
        "aphq": dict(reconstruction=dict(weighting="absolute", iterations=20), mlp_refit=True),
    }.get(name, {})
    search = {} if name == "repq" else dict(search=dict(grids=grids, rounds=1))
    settings = recipe(name, w_bits=w_bits, a_bits=a_bits, **search, **changes)
    model = build_swin()
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(1, 3, 29, 21 + 8 * (i % 2)) for i in range(images)], settings)
    return packed_state_dict(model)


def runs_of(processes: int) -> list[tuple[str, int, int, int]]:
    """All of them with two processes; with three one in which two have no image, and one in which each has a shard."""
    return RUNS if processes == 2 else RUNS[3:]


def work(rank: int, processes: int, port: int, folder: str) -> None:
    with process_group(rank, processes, port), small_shards():
        dealt = list(by_shard(pair for pair in DEALT.items() if pair[0] % processes == rank))
        torch.save(
            [own_images(IMAGES), dealt, {made: calibrated(*made) for made in runs_of(processes)}],
            f"{folder}/{rank}.pth",
        )


@pytest.fixture(scope="module")
def alone() -> dict[tuple[str, int, int, int], dict[str, torch.Tensor]]:
    with small_shards():
        return {made: calibrated(*made) for made in RUNS}


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_gives_the_same_bits(processes, alone, tmp_path, free_port):
    in_processes(work, processes, free_port, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(processes)]
    assert sorted(image for images, *_ in results for image in images) == list(range(IMAGES))
    assert all(images for images, *_ in results)
    assert all(dealt == [10, 20, 40, 60] for _, dealt, _ in results)  # in their order, whoever has them
    for made in runs_of(processes):
        for *_, states in results:
            assert all(torch.equal(alone[made][key], states[made][key]) for key in alone[made])


def die(rank: int, processes: int, port: int, folder: str) -> None:
    with process_group(rank, processes, port):
        if rank == 1:
            os._exit(1)
        with pytest.raises(CalibrationError, match=r"another process of this calibration has died.*--resume"):
            calibrated(*RUNS[0])
        open(f"{folder}/told", "w").close()


def test_a_dead_process_ends_the_others_with_a_message(tmp_path, free_port):
    context = mp.get_context("forkserver")
    children = [context.Process(target=die, args=(rank, 2, free_port, str(tmp_path))) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert (tmp_path / "told").exists()
    assert children[1].exitcode == 1


def alike(rank: int, processes: int, port: int, folder: str) -> None:
    """The first process has the say over results; what any of them refuses is refused by all."""

    def refuse() -> None:
        raise BadInputError(f"refused by {rank}")

    with process_group(rank, processes, port):
        tensors = [torch.full((2,), float(rank)), torch.tensor(rank)]
        take_from_first(tensors)
        assert [t.tolist() for t in tensors] == [[0.0, 0.0], 0]
        assert refused_together(lambda: "done", here=rank == 0) == ("done" if rank == 0 else None)
        for who in range(processes):
            with pytest.raises(BadInputError, match=f"refused by {who}"):
                refused_together(refuse, here=rank == who)
        open(f"{folder}/{rank}", "w").close()


def test_processes_end_alike_and_refuse_together(tmp_path, free_port):
    in_processes(alike, 2, free_port, str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def test_shards_of_one_process_come_in_their_order():
    assert list(by_shard(iter(DEALT.items()))) == [10, 20, 40, 60]
