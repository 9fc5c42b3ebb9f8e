import io
import json
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict, defaultdict, namedtuple

import addict
import mmengine
import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import (
    check_target,
    known_globals,
    map_values,
    plain,
    safe_load,
    tensor_bytes,
    write_atomic,
    write_json,
)

FORMATS = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def rewrite(path, *changes):
    """Replace bytes in a checkpoint's pickles, to the effect that another version or machine had written them."""

    def changed(data):
        for old, new in changes:
            assert old in data
            data = data.replace(old, new)
        return data

    content = path.read_bytes()
    if not zipfile.is_zipfile(path):
        path.write_bytes(changed(content))
        return
    source = zipfile.ZipFile(io.BytesIO(content))
    unknown_to_torch_1_6 = ("byteorder", ".format_version", ".storage_alignment", "serialization_id")
    with zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            if not name.endswith(unknown_to_torch_1_6):
                data = source.read(name)
                archive.writestr(name, changed(data) if name.endswith("/data.pkl") else data)


@FORMATS
def test_training_checkpoints_load_without_unpickling_code(tmp_path, zipped):
    path = tmp_path / "epoch_1.pth"
    history = HistoryBuffer()
    history.update(np.float64(1.5))
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2)).sum().backward()
    optimizer.step()
    content = {
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "message_hub": {"log_scalars": OrderedDict(loss=history), "resumed_keys": defaultdict(list, a=[1])},
        "meta": {"seed": np.int64(3), "name": np.str_("x"), "device": torch.device("cuda", 1), "epoch": 2},
        "arrays": [np.arange(2).astype(kind) for kind in ("f2", "f8", "u1", "i8", "?", "U3")],
        "factories": [defaultdict(kind) for kind in (dict, set, int, float)],
    }
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    assert zipfile.is_zipfile(path) == zipped
    loaded = safe_load(path)
    assert torch.equal(loaded["state_dict"]["weight"], model.weight)
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert loaded["message_hub"]["log_scalars"]["loss"].current() == 1.5
    assert loaded["message_hub"]["resumed_keys"] == {"a": [1]}
    assert loaded["meta"] == content["meta"]
    for array, expected in zip(loaded["arrays"], content["arrays"], strict=True):
        np.testing.assert_array_equal(array, expected, strict=True)


@FORMATS
def test_files_of_old_versions_load(tmp_path, zipped):
    """Numpy 1 called its module otherwise; tensors saved on a GPU are read where there is none."""
    path = tmp_path / "old.pth"
    content = {"lr": np.float64(0.5), "a": np.ones(2), "w": torch.ones(2)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    rewrite(
        path,
        (b"numpy._core.multiarray", b"numpy.core.multiarray"),
        (b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"),
    )
    loaded = safe_load(path)
    assert loaded["lr"] == 0.5
    assert loaded["a"].tolist() == [1, 1]
    assert loaded["w"].device.type == "cpu"
    assert loaded["w"].tolist() == [1, 1]


def test_configs_of_mmcv_come_back_as_plain_containers(tmp_path, monkeypatch):
    """As mmcv 1 wrote them; its classes are gone from mmcv 2."""

    class ConfigDict(addict.Dict):
        pass

    class Config:
        def __init__(self, content):
            self.content = content

        def __getstate__(self):
            return self.content, "config.py", "text"

        def __setstate__(self, state):
            raise AssertionError("the class itself must not be used")

    path = tmp_path / "a.pth"
    with monkeypatch.context() as context:
        module = types.ModuleType("mmcv.utils.config")
        for kind in (ConfigDict, Config):
            kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
            setattr(module, kind.__name__, kind)
        context.setitem(sys.modules, module.__name__, module)
        inner = ConfigDict(model=dict(type="RCNN", depths=[2, 2]))
        torch.save({"config": Config(inner), "dict": inner}, path)
    loaded = safe_load(path)
    assert loaded["dict"] == {"model": {"type": "RCNN", "depths": [2, 2]}}
    assert loaded["config"].state == (loaded["dict"], "config.py", "text")
    assert type(loaded["dict"]["model"]).__module__ == "collections"


def test_configs_of_mmengine_load(tmp_path):
    torch.save({"cfg": mmengine.Config(dict(model=dict(type="RCNN")))}, tmp_path / "a.pth")
    assert safe_load(tmp_path / "a.pth")["cfg"].state[0] == {"model": {"type": "RCNN"}}


def test_other_objects_are_refused_by_name(tmp_path):
    torch.save({"state_dict": {}, "x": pickle.Pickler}, tmp_path / "odd.pth")
    with pytest.raises(BadInputError, match=r"holds _?pickle\.Pickler, which is no tensor"):
        safe_load(tmp_path / "odd.pth")


def test_getattr_is_not_let_through(tmp_path):
    class Sneaky:
        def __init__(self, owner, name):
            self.asked = (owner, name)

        def __reduce__(self):
            return getattr, self.asked

    for owner, name in ((HistoryBuffer, "__init__"), (torch.Tensor, "mean"), (torch.Tensor, "__reduce__")):
        torch.save({"x": Sneaky(owner, name)}, tmp_path / "sneaky.pth")
        with pytest.raises(BadInputError, match=f"refused attribute '{name}'"):
            safe_load(tmp_path / "sneaky.pth")


@FORMATS
def test_a_blocked_module_is_named(tmp_path, zipped):
    class Shell:
        def __reduce__(self):
            return os.system, ("touch reached",)

    torch.save({"x": Shell()}, tmp_path / "shell.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(BadInputError, match=r"holds \w+\.system, which is no tensor"):
        safe_load(tmp_path / "shell.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOFError$"),
        (b"no checkpoint", "UnpicklingError: Unsupported operand"),
        (b"PK\x03\x04 broken", "RuntimeError: PytorchStreamReader failed"),
    ],
)
def test_no_checkpoint_is_refused(tmp_path, content, reason):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(BadInputError, match=rf"a\.pth cannot be loaded safely \(weights_only\): {reason}"):
        safe_load(tmp_path / "a.pth")


def test_numbers_and_arrays_become_plain(tmp_path):
    content = {"ap": np.float32(0.5), "palette": np.uint8([[1, 2]]), "size": torch.tensor(3), "names": ("a", "b")}
    want = {"ap": 0.5, "palette": [[1, 2]], "size": 3, "names": ["a", "b"]}
    assert plain(content) == want
    write_json(tmp_path / "a.json", content)
    assert json.loads((tmp_path / "a.json").read_text()) == want
    assert plain({"path": tmp_path, "keys": {"a": 1}.keys()}) == {"path": str(tmp_path), "keys": ["a"]}


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


def test_containers_of_values_stay_what_they_are_but_for_names():
    label = namedtuple("Label", "name number")
    given = {"classes": ("cat",), "palette": [(1, 2)], "labels": [label("cat", 1)]}
    assert map_values(given, str) == {"classes": ("cat",), "palette": [("1", "2")], "labels": [("cat", "1")]}
    assert type(map_values(given, str)["labels"][0]) is tuple


def test_equal_content_gives_equal_bytes():
    assert tensor_bytes({"a": torch.ones(3)}) == tensor_bytes({"a": torch.ones(3)})


def test_what_cannot_be_written_is_told_before_the_work(tmp_path):
    check_target(tmp_path / "new" / "folder" / "file.pth")
    (tmp_path / "file").touch()
    check_target(tmp_path / "file")
    with pytest.raises(BadInputError, match="is a folder; name a file"):
        check_target(tmp_path)
    with pytest.raises(BadInputError, match=r"below cannot be written: .*file is a file"):
        check_target(tmp_path / "file" / "below")


class Code:
    """Runs code where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("asked", [{}, {"weights_only": False}])
@pytest.mark.parametrize("name", ["TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_no_code_is_run_whatever_others_ask_of_torch(asked, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, "0" if "NO" not in name else "1")
    before = dict(os.environ)
    torch.save(Code(), "code.pth")
    with known_globals(), pytest.raises(pickle.UnpicklingError):
        torch.load("code.pth", **asked)
    assert not os.path.exists("ran")
    assert dict(os.environ) == before


@pytest.mark.skipif(torch.__version__ < (2, 6), reason="knows no globals by name")
def test_what_a_caller_allowed_stays_allowed(tmp_path):
    torch.save(HistoryBuffer([1.0], [1]), tmp_path / "x.pth")
    with known_globals():
        safe_load(tmp_path / "x.pth")
        torch.load(tmp_path / "x.pth", weights_only=True)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.pth", weights_only=True)
