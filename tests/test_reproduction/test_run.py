import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from reproduction_trial import examined_coco

from apq_mmdet.errors import BadInputError
from apq_mmdet.reproduction import run
from apq_mmdet.reproduction.lock import locked
from apq_mmdet.reproduction.run import (
    FULL_DISK,
    DiskFullError,
    RunFailedError,
    command_line,
    execute,
    finished,
    run_logged,
    tail,
)


@pytest.fixture
def examined(selection):
    return examined_coco(selection)


def test_the_line_of_a_row(selection, settings, examined):
    row = selection.rows[1]
    line = command_line(row, examined.checkpoints[row.detector.name], settings)
    assert line[0] == sys.executable
    assert line[1].endswith("tools/quantize_det.py")
    assert line[2] == str(settings.config(row.name))
    told = dict(zip(line[4:-2:2], line[5:-2:2], strict=False))
    assert told["--work-dir"] == str(settings.folder(row.name))
    assert (told["--num-calib"], told["--seed"], told["--memory-budget"]) == ("2", "0", "4.0")
    assert "--resume" in line
    assert "--launcher" not in line
    assert line[-2:] == ["--device", "cpu"]


def test_the_line_of_several_processes(selection, settings, examined):
    detector = selection.detectors[0]
    line = command_line(detector, examined.checkpoints[detector.name], replace(settings, processes=8, device=None))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=8"]
    assert line[:7] == [*start, "-m", "apq_mmdet.reproduction.float_ap"]
    assert line[-2:] == ["--launcher", "pytorch"]
    assert "--resume" not in line


def python(code):
    return [sys.executable, "-c", code]


def test_a_log_grows(tmp_path):
    for word in ("one", "two"):
        run_logged(python(f"print('{word}')"), tmp_path / "new" / "log.txt")
    lines = (tmp_path / "new" / "log.txt").read_text().splitlines()
    assert [line for line in lines if line in ("one", "two")] == ["one", "two"]
    assert sum(line.startswith("$ ") for line in lines) == 2


def test_a_failure_shows_the_end_of_its_log(tmp_path):
    code = "print(*range(50), sep=chr(10)); raise SystemExit(3)"
    with pytest.raises(RunFailedError, match=r"(?s)exit code 3.*log.txt:\n    35\n.*    49$") as caught:
        run_logged(python(code), tmp_path / "log.txt")
    assert not isinstance(caught.value, DiskFullError)


def test_states_of_a_progress_bar_are_lines(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"start\n" + b"".join(b"\r%d" % n for n in range(100)) + b"\nend\n")
    assert tail(tmp_path / "log.txt").split() == [*map(str, range(86, 100)), "end"]


@pytest.mark.parametrize(
    "message", ["OSError: [Errno 28] No space left on device", "PytorchStreamWriter failed writing file data/3"]
)
def test_a_full_disk_is_told_apart(tmp_path, message):
    with pytest.raises(DiskFullError, match="the disk is full"):
        run_logged(python(f"raise SystemExit('{message}')"), tmp_path / "log.txt")


def test_a_disk_that_was_full_is_not_full_for_ever(tmp_path):
    with pytest.raises(DiskFullError):
        run_logged(python(f"raise SystemExit('{FULL_DISK[0]}')"), tmp_path / "log.txt")
    with pytest.raises(RunFailedError, match="a broken config") as caught:
        run_logged(python("raise SystemExit('a broken config')"), tmp_path / "log.txt")
    assert not isinstance(caught.value, DiskFullError)
    assert FULL_DISK[0] not in str(caught.value)


def test_an_interrupt_ends_the_process(tmp_path):
    pid = tmp_path / "pid"
    code = f"import os, time; open('{pid}', 'w').write(str(os.getpid())); time.sleep(60)"
    threading.Thread(target=interrupt_when_there, args=(pid,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run_logged(python(code), tmp_path / "log.txt")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_an_interrupt_ends_what_the_process_started(tmp_path):
    there = tmp_path / "there"
    code = f"import os, time; child = os.fork(); child or open('{there}', 'w').write('yes'); time.sleep(60)"
    threading.Thread(target=interrupt_when_there, args=(there,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        run_logged(python(code), tmp_path / "log.txt")
    for _ in range(500):  # a killed process gives its files back a moment later
        with contextlib.suppress(BadInputError), locked(tmp_path):
            break
        time.sleep(0.01)
    else:
        pytest.fail("the child of the process still holds the lock")


def interrupt_when_there(pid):
    while not (pid.exists() and pid.read_text()):
        time.sleep(0.01)
    time.sleep(0.3)  # until the process is waited for
    os.kill(os.getpid(), signal.SIGINT)


def test_a_result_and_its_conditions(selection, settings, examined, monkeypatch):
    row = selection.rows[0]
    report = {
        "calibration_images": [0, 1],
        "metrics": {"float": None, "quantized": {"a": 1}},
        "seconds": 5,
        "blocks": [],
    }
    (settings.folder(row.name)).mkdir(parents=True)
    (settings.folder(row.name) / "report.json").write_text(json.dumps(report))
    monkeypatch.setattr(run, "run_logged", lambda line, log: None)
    assert finished(row, examined, settings) is None
    result = execute(row, examined, settings)
    assert result == {"metrics": {"a": 1}, "seconds": 5}
    assert finished(row, examined, settings) == result
    examined.conditions[row.name]["version"] = "2"
    with pytest.raises(BadInputError, match="under other conditions, they differ in version; use another --work-dir"):
        finished(row, examined, settings)


def test_what_was_begun_has_conditions_too(selection, settings, examined, monkeypatch):
    row = selection.rows[0]

    def fail(line, log):
        raise RunFailedError("killed")

    monkeypatch.setattr(run, "run_logged", fail)
    with pytest.raises(RunFailedError):
        execute(row, examined, settings)
    assert finished(row, examined, settings) is None
    examined.conditions[row.name]["version"] = "2"
    with pytest.raises(BadInputError, match="they differ in version"):
        finished(row, examined, settings)


def test_other_calibration_images_than_were_listed(selection, settings, examined, monkeypatch):
    row = selection.rows[0]
    (settings.folder(row.name)).mkdir(parents=True)
    (settings.folder(row.name) / "report.json").write_text(json.dumps({"calibration_images": [0, 2]}))
    monkeypatch.setattr(run, "run_logged", lambda line, log: None)
    with pytest.raises(RunFailedError, match="other calibration images"):
        execute(row, examined, settings)


def test_one_command_at_a_time(tmp_path):
    with locked(tmp_path / "work"), pytest.raises(BadInputError, match="works in"), locked(tmp_path / "work"):
        pass
    with locked(tmp_path / "work"):
        pass


def test_a_work_dir_that_cannot_be_written_to(tmp_path):
    (tmp_path / ".lock").mkdir()
    with pytest.raises(BadInputError, match="cannot be written to"), locked(tmp_path):
        pass


def test_a_row_inherits_the_lock(tmp_path):
    held = "any(os.path.realpath(f'/proc/self/fd/{n}').endswith('.lock') for n in os.listdir('/proc/self/fd'))"
    with locked(tmp_path):
        run_logged(python(f"import os, sys; sys.exit(not {held})"), tmp_path / "log.txt")


def test_a_process_that_was_left_holds_the_lock(tmp_path):
    with locked(tmp_path):
        process = subprocess.Popen(python("input()"), stdin=subprocess.PIPE, close_fds=False)
    with pytest.raises(BadInputError, match="a row that a killed command left running"), locked(tmp_path):
        pass
    process.communicate(b"\n")
    with locked(tmp_path):
        pass
