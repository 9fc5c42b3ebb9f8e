import os
from types import SimpleNamespace

import pytest
import torch

from apq_mmdet.calibration.store import CaptureStore, TensorStore
from apq_mmdet.errors import CalibrationError


def tree(value):
    return {"a": (torch.full((100,), value), None, 7), "b": [torch.zeros(3)]}


def test_beyond_its_memory_it_goes_to_disk_and_comes_back(tmp_path):
    with TensorStore(tmp_path, memory=1000) as store:
        for key in range(5):
            store.put(key, tree(float(key)))
        files = list(tmp_path.glob("apq_capture_*/*"))
        assert len(files) == 3  # two trees of 412 bytes fit
        for key in range(5):
            got = store.get(key)
            assert torch.equal(got["a"][0], torch.full((100,), float(key)))
            assert got["a"][1:] == (None, 7)
        store.drop(0)
        store.drop(3)
        assert len(list(tmp_path.glob("apq_capture_*/*"))) == 2
        store.put("new", tree(9.0))  # takes the memory that was given back
        assert len(list(tmp_path.glob("apq_capture_*/*"))) == 2
    assert not list(tmp_path.iterdir())


def test_room_is_what_memory_and_half_of_the_disk_have_left(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**34))
    monkeypatch.setattr("apq_mmdet.calibration.store.get_world_size", lambda: 2)
    with TensorStore(tmp_path, memory=1000) as store:
        assert store.room == 2**32 + 1000  # the other process has a share, too
        store.put("t", torch.zeros(100))
        assert store.room == 2**32 + 600
    with TensorStore(memory=1000) as store:
        assert store.room == 2**31 + 1000  # of a folder that may be memory


def test_a_folder_that_is_gone_has_no_room(tmp_path):
    with TensorStore(tmp_path, memory=1000) as store:
        store._folder.cleanup()
        assert store.room == 1000


def test_what_is_kept_is_a_copy():
    for memory in (0, 1000):
        with TensorStore(memory=memory) as store:
            t = torch.ones(4)
            store.put("t", [t])
            t.zero_()
            assert store.get("t")[0].tolist() == [1, 1, 1, 1]


def test_calls_come_back_in_the_order_of_the_images_once():
    with CaptureStore(memory=10**6) as store:
        for image in (2, 0, 1):
            x = torch.full((1, 2), float(image))
            store.add_call("b", image, (x,), {"k": 3}, (x + 1, (1, 2)))
            store.add_grads("b", image, 0, [x * 2])
        calls = list(store.take_calls("b"))
        assert [c.image for c in calls] == [0, 1, 2]
        assert calls[2].outputs[0].tolist() == [[3, 3]]
        assert calls[2].grads[0].tolist() == [[4, 4]]
        assert calls[2].kwargs == {"k": 3}


def test_calls_without_gradients_come_back_without_them():
    with CaptureStore(memory=10**6) as store:
        store.add_call("b", 0, (torch.ones(1),), {}, torch.ones(1))
        assert [call.grads for call in (*store.inputs("b"), *store.take_calls("b"))] == [None, None]


def test_what_is_kept_anew_takes_the_place_of_what_was(tmp_path):
    """On disk at first and in memory later, and the other way round."""
    with TensorStore(tmp_path, memory=500) as store:
        store.put("other", tree(0.0))  # fills the memory
        store.put("key", tree(1.0))
        store.drop("other")
        store.put("key", tree(2.0))
        assert store.get("key")["a"][0].unique().tolist() == [2.0]
        assert not list(tmp_path.glob("apq_capture_*/*"))
        store.put("key", {"a": torch.full((1000,), 3.0)})
        assert store.get("key")["a"].unique().tolist() == [3.0]


def test_a_full_disk_is_told_with_its_place(tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError("unexpected pos 576 vs 534")  # what torch's writer says

    monkeypatch.setattr(torch, "save", fail)
    with (
        TensorStore(tmp_path) as store,
        pytest.raises(CalibrationError, match=r"written to .*apq_capture.* in a disk with .* MiB free"),
    ):
        store.put("key", tree(1.0))


def test_an_input_that_is_replaced_keeps_the_float_one_and_the_output():
    with CaptureStore(memory=10**6) as store:
        store.add_call("b", 0, (torch.zeros(2),), {"y": torch.ones(2)}, torch.full((2,), 5.0))
        store.replace_input("b", 0, 0, (torch.full((2,), 3.0),), {"y": torch.full((2,), 4.0)})
        (call,) = store.take_calls("b")
    (x,), (float_x,) = call.args, call.float_inputs[0]
    assert (x.tolist(), call.kwargs["y"].tolist()) == ([3, 3], [4, 4])
    assert (float_x.tolist(), call.float_inputs[1]["y"].tolist()) == ([0, 0], [1, 1])
    assert call.outputs[0].tolist() == [5, 5]


@pytest.mark.parametrize(
    ("parts", "want"),
    [
        # of processes that have the images 0 and 16, and 8
        ([{0: ["body"], 16: ["body", "mask"]}, {8: ["body", "box"]}], ["body", "box", "mask"]),
        ([{16: ["body", "mask"], 0: ["body"]}, {}, {8: ["body", "box"]}], ["body", "box", "mask"]),
        ([{0: ["down"]}, {8: ["up", "down"]}], ["up", "down"]),
        ([{8: ["up", "down"]}, {0: ["down"]}], ["up", "down"]),
        ([{0: ["c", "d"], 1: ["b", "c"], 2: ["a", "b", "d"]}], ["a", "b", "c", "d"]),
        ([{0: ["a", "d"], 1: ["b", "d"], 2: ["c", "d"]}], ["a", "b", "c", "d"]),
        ([{0: ["b"], 1: ["a"], 2: ["a", "b"]}], ["a", "b"]),  # seen apart before they are seen together
        ([{0: ["a", "b"], 1: ["b", "a"]}], ["a", "b"]),  # the first image decides
    ],
)
def test_blocks_come_in_the_order_of_the_images_and_before_what_they_run_before(parts, want, monkeypatch):
    monkeypatch.setattr("apq_mmdet.calibration.store.gather", lambda own: parts)
    with CaptureStore() as store:
        assert store.order() == want


def test_the_order_of_blocks_is_that_of_their_first_calls_on_an_image():
    with CaptureStore() as store:
        for image, blocks in ((1, ["up", "down", "up", "last"]), (0, ["down", "down"])):
            for block in blocks:
                store.add_call(block, image, (), {}, torch.zeros(1))
        assert store.order() == ["up", "down", "last"]


def test_a_folder_that_cannot_be_removed_costs_nothing(tmp_path, monkeypatch):
    """Such as one on a network file system, where something still holds a file."""

    def fail(*_, **__):
        raise OSError("busy")

    with TensorStore(tmp_path) as store:
        store.put("x", torch.zeros(3))
        monkeypatch.setattr(os, "rmdir", fail)
    assert list(tmp_path.iterdir())
