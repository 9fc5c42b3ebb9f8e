"""The order of work and what comes of failures; processes that only write a report stand in for the real ones."""

import errno
import json
import os
import shutil
import signal
import tempfile
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from reproduction_trial import NAME, examined_coco

from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction import command, reproduce, run
from apq_mmdet.reproduction.costs import Cost
from apq_mmdet.reproduction.space import shortage

STAND_IN = """
import json, os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--work-dir") + 1])
told = json.loads(pathlib.Path({told!r}).read_text())
for name, code in told["code"].items():
    if folder.name.startswith(name):
        exec(code)
box, mask = told["ap"]
metrics = {{"coco/bbox_mAP": box / 100, "coco/segm_mAP": mask / 100}}
ids = folder / "calibration_images.json"
images = [image["id"] for image in json.loads(ids.read_text())["images"]] if ids.exists() else []
folder.mkdir(exist_ok=True)
report = {{"metrics": {{"float": metrics, "quantized": metrics}}, "calibration_images": images, "seconds": 60,
          "versions": {{"torch": "2"}}, "device": "cpu", "threads": 1}}
(folder / "report.json").write_text(json.dumps(report))
"""
GIB = 2**30
Usage = namedtuple("Usage", "total used free")


class Told:
    """What the processes will do: the AP that they report, and code that they run first, by the start of a name."""

    def __init__(self, path):
        self.path = path
        self(46.0, 41.7)

    def __call__(self, box=46.0, mask=41.7, **code):
        names = {"detector": f"{NAME}", "eight": f"{NAME}_apq-w8a8", "four": f"{NAME}_apq-w4a4"}
        self.path.write_text(json.dumps({"ap": (box, mask), "code": {names[key]: c for key, c in code.items()}}))


@pytest.fixture
def told(tmp_path):
    return Told(tmp_path / "told.json")


@pytest.fixture
def main(selection, index, settings, tmp_path, told, monkeypatch):
    """Runs the command with further options; returns its exit code."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN.format(told=str(told.path)))
    monkeypatch.setattr(run, "QUANTIZE", [str(stand_in)])
    monkeypatch.setattr(run, "FLOAT_AP", [str(stand_in)])
    monkeypatch.setattr(reproduce, "own_process", here)
    monkeypatch.setattr(reproduce, "examine", lambda selection, settings: examined_coco(selection))
    monkeypatch.setattr(
        reproduce,
        "estimate",
        lambda selection, *_: {item.name: COST for item in (*selection.detectors, *selection.rows)},
    )
    options = ["--data-root", str(settings.data_root), "--checkpoints", str(settings.checkpoints), "--num-calib", "2"]
    options += ["--work-dir", str(settings.work_dir), "--index", str(index)]
    return lambda *more: command.main([*options, *more])


COST = Cost(60.0, 60.0, GIB, kept_bytes=2 * GIB, temporary_bytes=3 * GIB, results_bytes=0, machine="abacus")


@contextmanager
def here():
    yield lambda function, *args: function(*args)


def states(settings):
    rows = json.loads((settings.work_dir / "table.json").read_text())["rows"]
    return [row["state"] for row in rows]


def with_results(monkeypatch, size):
    cost = replace(COST, results_bytes=size)

    def estimate(selection, *_):
        return {item.name: cost for item in (*selection.detectors, *selection.rows)}

    monkeypatch.setattr(reproduce, "estimate", estimate)


def starts(settings):
    """How often each of the detector, the 8-bit and the 4-bit row was started."""
    logs = [
        settings.folder(f"{NAME}{part}") / "log.txt"
        for part in ("", "_apq-w8a8_calib2_seed0", "_apq-w4a4_calib2_seed0")
    ]
    return [log.read_text().count("\n$ ") if log.exists() else 0 for log in logs]


def test_the_whole_table(main, settings, capsys):
    assert main() == 0
    assert states(settings) == ["done", "done", "done"]
    assert starts(settings) == [1, 1, 1]
    assert f"table: {settings.work_dir / 'table.md'}" in capsys.readouterr().out
    assert main() == 0  # nothing is made twice
    assert starts(settings) == [1, 1, 1]


def test_dry_run(main, settings, capsys):
    assert main("--dry-run") == 0
    told = capsys.readouterr().out
    assert "calibration about 1.0 min, evaluation at least 1.0 min, memory 1.0 GiB, disk 2.00 GiB" in told
    assert "3 of 3 lines are to be made: about 0.1 h on this machine (abacus)" in told
    assert starts(settings) == [0, 0, 0]
    assert not (settings.work_dir / "table.json").exists()
    ids = settings.folder(f"{NAME}_apq-w4a4_calib2_seed0") / "calibration_images.json"
    assert str(ids) in told
    assert [image["id"] for image in json.loads(ids.read_text())["images"]] == [0, 1]


def test_a_row_that_fails_does_not_stop_the_rest(main, told, settings, capsys):
    told(eight="sys.exit('this is why')")
    assert main() == 1
    assert states(settings) == ["done", "failed", "done"]
    output = capsys.readouterr().out
    assert "    this is why" in output
    assert f"failed: {NAME}_apq-w8a8_calib2_seed0" in output
    told()
    assert main() == 0
    assert starts(settings) == [1, 2, 1]
    assert states(settings) == ["done", "done", "done"]


def test_without_its_float_detector_no_row_is_run(main, told, settings):
    told(detector="sys.exit('broken')")
    assert main() == 1
    assert states(settings) == ["failed", *["not run, its float detector failed"] * 2]
    assert starts(settings) == [1, 0, 0]


@pytest.mark.parametrize("ap", [(45.8, 41.7), (46.0, 41.9)])
def test_a_float_detector_off_its_reference_stops(main, told, settings, capsys, ap):
    told(*ap)
    assert main() == 1
    assert states(settings) == ["done, off its reference", "waiting", "waiting"]
    assert starts(settings) == [1, 0, 0]
    output = capsys.readouterr()
    assert f"float AP {ap[0]} / {ap[1]} is not within 0.1 of 46.0 / 41.7" in output.out
    assert "--allow-float-gap goes on" in output.err
    assert main("--allow-float-gap") == 0
    assert starts(settings) == [1, 1, 1]
    assert states(settings) == ["done, off its reference", "done", "done"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_repeated(main, told, settings, capsys, number):
    told(eight=f"import time; time.sleep(0.3); os.kill(os.getppid(), {int(number)}); time.sleep(60)")
    assert main() == 1
    assert "interrupted; repeat the command to go on" in capsys.readouterr().err
    assert states(settings) == ["done", "waiting", "waiting"]
    told()
    assert main() == 0
    assert states(settings) == ["done", "done", "done"]
    assert starts(settings) == [1, 2, 1]


def free(monkeypatch, *values):
    """Let the disks have so many GiB, one value for each look, the last for all further ones."""
    left = list(values)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, (left.pop(0) if len(left) > 1 else left[0]) * GIB))


def test_a_disk_that_is_too_small(main, settings, monkeypatch, capsys):
    free(monkeypatch, 8.9)  # 3 x 2 stay, 3 at a time
    assert main() == 2
    assert "has 8.90 GiB free, what is to be made needs up to 9.00 GiB" in capsys.readouterr().err
    assert starts(settings) == [0, 0, 0]
    free(monkeypatch, 9.1)
    assert main() == 0


def test_a_work_dir_that_is_the_temporary_folder_needs_room_for_both(main, settings, monkeypatch, capsys):
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(settings.work_dir))
    with_results(monkeypatch, GIB)
    free(monkeypatch, 9.9)
    assert main() == 2
    assert "what is to be made needs up to 10.00 GiB" in capsys.readouterr().err
    free(monkeypatch, 10.1)
    assert main() == 0


def test_results_of_one_evaluation_lie_in_the_temporary_folder(tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(temporary))
    monkeypatch.setattr(Path, "stat", lambda path, **_: SimpleNamespace(st_dev=int(path == temporary)))
    costs = [replace(COST, results_bytes=size) for size in (GIB, 2 * GIB, 0)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 9 * GIB if path == tmp_path else 1.9 * GIB))
    assert f"{temporary} has 1.90 GiB free, what is to be made needs up to 2.00 GiB" in shortage(costs, tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 9 * GIB if path == tmp_path else 2 * GIB))
    assert shortage(costs, tmp_path) is None


def test_a_disk_that_fills_up_between_rows(main, settings, monkeypatch, capsys):
    free(monkeypatch, 9.1, 9.1, 9.1, 9.1, 9.1, 9.1, 4.9)  # two looks each: work dir, temporary folder
    assert main() == 1
    assert "no space left; free some and repeat the command" in capsys.readouterr().err
    assert states(settings) == ["done", "done", "failed"]
    free(monkeypatch, 5.1)
    assert main() == 0
    assert starts(settings) == [1, 1, 1]


def test_a_row_that_meets_a_full_disk(main, told, settings, capsys):
    told(eight="sys.exit('OSError: [Errno 28] No space left on device')")
    assert main() == 1
    assert "no space left; free some and repeat the command" in capsys.readouterr().err
    assert states(settings) == ["done", "failed", "waiting"]
    told()
    assert main() == 0


def test_a_table_that_meets_a_full_disk(main, settings, monkeypatch, capsys):
    assert main("--rows", NAME) == 0
    before = (settings.work_dir / "table.json").read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert main() == 1
    told = capsys.readouterr().err
    assert "no space left in" in told
    assert "free some and repeat the command" in told
    assert (settings.work_dir / "table.json").read_bytes() == before
    assert main() == 0
    assert starts(settings) == [1, 1, 1]


def test_results_of_other_conditions_are_refused(main, selection, settings, monkeypatch, capsys):
    assert main() == 0
    examined = examined_coco(selection)
    changed = replace(examined, conditions={name: {"version": "2"} for name in examined.conditions})
    monkeypatch.setattr(reproduce, "examine", lambda *_: changed)
    assert main() == 2
    assert "under other conditions, they differ in version" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rows", "*w3a3"], "matches no model"),
        (["--nproc-per-node", "2"], "--nproc-per-node needs --launcher pytorch"),
        (["--launcher", "pytorch", "--nproc-per-node", "0"], "must be at least 1, got 0"),
        (["--seeds", "0", "-1"], "--seeds must be from 0"),
        (["--memory-budget", "0"], "--memory-budget must be a number of GiB above 0"),
        (["--data-root", "nowhere"], "has no annotations/instances_train2017.json"),
        (["--checkpoints", "nowhere"], "checkpoints are missing; --download fetches them"),
    ],
)
def test_bad_options(main, settings, capsys, options, message):
    assert main(*options) == 2
    assert message in capsys.readouterr().err
    assert starts(settings) == [0, 0, 0]


def test_a_work_dir_that_is_a_file(main, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main("--work-dir", str(tmp_path / "file")) == 2
    assert "cannot be written to" in capsys.readouterr().err


def test_errors_of_the_checks_end_before_work(main, settings, monkeypatch, capsys):
    def refuse(*_):
        raise BadInputError("image 7 is truncated")

    monkeypatch.setattr(reproduce, "examine", refuse)
    assert main() == 2
    assert "error: image 7 is truncated" in capsys.readouterr().err
    assert starts(settings) == [0, 0, 0]
