import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import safe_load, tensor_bytes, write_atomic


def test_training_checkpoints_load_without_unpickling_code(tmp_path):
    history = HistoryBuffer()
    history.update(np.float64(1.5))
    torch.save({"state_dict": {"w": torch.ones(2)}, "log": history, "lr": np.float32(0.1)}, tmp_path / "epoch_1.pth")
    assert torch.equal(safe_load(tmp_path / "epoch_1.pth")["state_dict"]["w"], torch.ones(2))


def test_files_written_under_numpy_1_load(tmp_path):
    source = zipfile.ZipFile(io.BytesIO(tensor_bytes({"lr": np.float64(0.5)})))
    with zipfile.ZipFile(tmp_path / "old.pth", "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert b"numpy.core.multiarray" in (tmp_path / "old.pth").read_bytes()
    assert float(safe_load(tmp_path / "old.pth")["lr"]) == 0.5


def test_other_objects_are_refused_by_name(tmp_path):
    torch.save({"state_dict": {}, "x": pickle.Pickler}, tmp_path / "odd.pth")
    with pytest.raises(BadInputError, match=r"holds _?pickle\.Pickler, which is no tensor"):
        safe_load(tmp_path / "odd.pth")


def test_getattr_is_not_let_through(tmp_path):
    class Sneaky:
        def __reduce__(self):
            return getattr, (HistoryBuffer, "__init__")

    torch.save({"x": Sneaky()}, tmp_path / "sneaky.pth")
    with pytest.raises(BadInputError):
        safe_load(tmp_path / "sneaky.pth")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_equal_content_gives_equal_bytes():
    assert tensor_bytes({"a": torch.ones(3)}) == tensor_bytes({"a": torch.ones(3)})
