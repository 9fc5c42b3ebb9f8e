"""The folder of finished blocks: nothing in it is lost that its owner wants to keep."""

import errno
import itertools
import json
from pathlib import Path

import mmcv
import pytest
import torch

from apq_mmdet.engine.block_states import BlockStatesOnDisk, check_folder
from apq_mmdet.engine.run_record import calibration_conditions
from apq_mmdet.errors import BadInputError

RUN = {"seed": 0, "bits": 4}


def with_a_block(folder: Path, run: dict = RUN) -> BlockStatesOnDisk:
    states = BlockStatesOnDisk(folder, run, resume=False)
    states.save("stages.0", {"seconds": 1.0})
    return states


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path, resume):
    (tmp_path / "000001.jpg").touch()
    with pytest.raises(BadInputError, match=r"holds 000001\.jpg, which is no block of a calibration.*--work-dir"):
        BlockStatesOnDisk(tmp_path, RUN, resume)
    assert names(tmp_path) == {"000001.jpg"}


def test_a_file_in_its_place_is_refused(tmp_path):
    (tmp_path / "calibration").touch()
    with pytest.raises(BadInputError, match="calibration is a file"):
        BlockStatesOnDisk(tmp_path / "calibration", RUN, resume=False)


def test_blocks_of_an_unfinished_run_are_not_thrown_away_by_its_own_command(tmp_path):
    with_a_block(tmp_path)
    for check in (check_folder, BlockStatesOnDisk):
        with pytest.raises(BadInputError, match="holds 1 finished blocks of this very run: go on with --resume"):
            check(tmp_path, RUN, False)
    assert BlockStatesOnDisk(tmp_path, RUN, resume=True).load("stages.0") == {"seconds": 1.0}


def test_a_finished_run_can_be_repeated_and_resumed(tmp_path):
    with_a_block(tmp_path).finish()
    resumed = BlockStatesOnDisk(tmp_path, RUN, resume=True)
    assert resumed.load("stages.0") == {"seconds": 1.0}
    with pytest.raises(BadInputError, match="go on with --resume"):  # it may be broken off again
        check_folder(tmp_path, RUN, False)
    resumed.finish()
    with pytest.raises(BadInputError, match=r"differs in seed; .* drop --resume to start anew"):
        check_folder(tmp_path, {**RUN, "seed": 1}, True)
    assert BlockStatesOnDisk(tmp_path, RUN, resume=False).load("stages.0") is None
    assert names(tmp_path) == {".lock", "run.json"}


def test_nor_by_another_one(tmp_path):
    with_a_block(tmp_path)
    for check in (check_folder, BlockStatesOnDisk):
        with pytest.raises(BadInputError, match=r"broken off, from which this one differs in seed: .*--work-dir"):
            check(tmp_path, {**RUN, "seed": 1}, False)
        with pytest.raises(BadInputError, match=r"belongs to another run, it differs in seed; .*another --work-dir"):
            check(tmp_path, {**RUN, "seed": 1}, True)
    assert BlockStatesOnDisk(tmp_path, RUN, resume=True).load("stages.0") == {"seconds": 1.0}


def test_another_run_follows_a_finished_one_and_deletes_only_what_is_its_own(tmp_path):
    with_a_block(tmp_path).finish()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "apq_capture_killed").mkdir()
    (tmp_path / ".stages.1.pth.123.tmp").touch()  # of a run that was killed while it wrote
    other = {**RUN, "seed": 1}
    BlockStatesOnDisk(tmp_path, other, resume=False)
    assert names(tmp_path) == {".lock", "run.json", "notes.txt"}
    assert json.loads((tmp_path / "run.json").read_text()).items() >= other.items()


def test_a_run_that_is_killed_while_it_deletes_can_start_again(tmp_path, monkeypatch):
    with_a_block(tmp_path).finish()

    def die(*_, **__):
        raise KeyboardInterrupt

    for what in ("pathlib.Path.unlink", "apq_mmdet.engine.block_states.write_json"):
        with monkeypatch.context() as patched:
            patched.setattr(what, die)
            with pytest.raises(KeyboardInterrupt):
                BlockStatesOnDisk(tmp_path, {**RUN, "seed": 1}, resume=False)
    BlockStatesOnDisk(tmp_path, {**RUN, "seed": 1}, resume=False)
    assert names(tmp_path) == {".lock", "run.json"}


def test_what_a_calibration_depends_on(tmp_path, monkeypatch):
    """Another byte of any image, another device, number of threads or version of torch or mmcv are other conditions."""
    images = [tmp_path / "first.png", tmp_path / "last.png"]
    for image in images:
        image.write_bytes(b"pixels")
    seen = [calibration_conditions(images, "cpu")]
    assert seen[0] == calibration_conditions(images, "cpu")
    for image in images:
        image.write_bytes(b"pixelz")
        seen.append(calibration_conditions(images, "cpu"))
    seen.append(calibration_conditions(images, "cuda"))
    torch.set_num_threads(2)
    seen.append(calibration_conditions(images, "cuda"))
    monkeypatch.setattr(torch, "__version__", "0.0")
    seen.append(calibration_conditions(images, "cuda"))
    monkeypatch.setattr(mmcv, "__version__", "0.0")
    seen.append(calibration_conditions(images, "cuda"))
    changed = [{key for key in a if a[key] != b.get(key)} for a, b in itertools.pairwise(seen)]
    assert changed == [*2 * [{"calibration_images_sha256"}], {"device"}, {"threads"}, {"torch"}, {"mmcv"}]


def test_a_block_that_cannot_be_saved_leaves_what_was_kept(tmp_path, monkeypatch):
    states = with_a_block(tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        states.save("stages.0", {"seconds": 2.0})
    assert states.load("stages.0") == {"seconds": 1.0}


def test_a_damaged_block_is_made_again_once_it_is_deleted(tmp_path):
    block = tmp_path / "stages.0.pth"
    states = with_a_block(tmp_path)
    for content in (b"", b"no archive", block.read_bytes()[:-100]):
        block.write_bytes(content)
        with pytest.raises(BadInputError, match=r"stages\.0\.pth is damaged \(\w+\): delete it, and --resume"):
            states.load("stages.0")
    block.unlink()
    assert BlockStatesOnDisk(tmp_path, RUN, resume=True).load("stages.0") is None


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_damaged_description_is_told_with_its_remedy(tmp_path, content, resume):
    with_a_block(tmp_path)
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(BadInputError, match=r"run\.json is damaged, .*: delete .* to start anew"):
        BlockStatesOnDisk(tmp_path, RUN, resume)
    assert "stages.0.pth" in names(tmp_path)


def test_a_folder_that_cannot_be_made_or_written_to_is_refused(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise PermissionError("permission denied")

    for what in ("pathlib.Path.mkdir", "pathlib.Path.open"):
        with monkeypatch.context() as patched:
            patched.setattr(what, fail)
            with pytest.raises(BadInputError, match=r"--work-dir: .*calibration cannot be written to: permission"):
                BlockStatesOnDisk(tmp_path / "calibration", RUN, resume=False)


def test_blocks_of_another_format_are_not_resumed(tmp_path, monkeypatch):
    with_a_block(tmp_path)
    monkeypatch.setattr("apq_mmdet.engine.block_states.FORMAT", 99)
    with pytest.raises(BadInputError, match="differs in block_format"):
        BlockStatesOnDisk(tmp_path, RUN, resume=True)


def test_file_systems_without_locks_are_used_without(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr("apq_mmdet.locks.fcntl.lockf", fail)
    with pytest.warns(UserWarning, match="cannot be locked .*start no second run"):
        BlockStatesOnDisk(tmp_path, RUN, resume=False)
