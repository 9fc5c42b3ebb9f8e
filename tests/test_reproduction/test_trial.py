"""The real processes on the drawn data: a table that was interrupted and completed."""

import json
import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
from reproduction_trial import NAME, write_index

from apq_mmdet.reproduction import command, reproduce
from apq_mmdet.reproduction.worker import own_process

ROW = f"{NAME}_minmax-w4a4_calib2_seed0"


@contextmanager
def here():
    yield lambda function, *args: function(*args)


def interrupt_when_there(path):
    while not path.exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def test_interrupted_and_completed(detector, settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "own_process", here)  # saves a start
    index = write_index(tmp_path, detector, [("minmax", 4)])
    options = ["--data-root", str(settings.data_root), "--checkpoints", str(settings.checkpoints), "--not-coco"]
    options += ["--work-dir", str(settings.work_dir), "--index", str(index), "--num-calib", "2", "--device", "cpu"]
    row = settings.folder(ROW)
    threading.Thread(target=interrupt_when_there, args=(row / "calibration",), daemon=True).start()
    assert command.main(options) == 1
    assert "interrupted; repeat the command" in capsys.readouterr().err
    table = settings.work_dir / "table.json"
    assert [entry["state"] for entry in json.loads(table.read_text())["rows"]] == ["done", "waiting"]
    assert not (row / "quantized.pth").exists()

    assert command.main(options) == 0
    content = json.loads(table.read_text())
    assert content["data"]["is_coco"] is False
    measured, quantized = content["rows"]
    assert measured["ours"]["box"] > 30 < measured["ours"]["mask"]  # the demo detector on what it was trained for
    report = json.loads((row / "report.json").read_text())
    assert quantized["ours"]["box"] == pytest.approx(100 * report["metrics"]["quantized"]["coco/bbox_mAP"])
    assert quantized["ours"]["mask"] == pytest.approx(100 * report["metrics"]["quantized"]["coco/segm_mAP"])
    assert abs(quantized["ours"]["box"] - measured["ours"]["box"]) < 20
    assert (report["recipe"], report["bits"]) == ("minmax", {"weight": 4, "activation": 4})
    listed = json.loads((settings.work_dir / quantized["calibration_images"]).read_text())["images"]
    assert [image["id"] for image in listed] == report["calibration_images"]
    assert quantized["versions"] == report["versions"] == measured["versions"]
    assert (row / "quantized.pth").exists()
    assert (settings.folder(NAME) / "log.txt").read_text().count("\n$ ") == 1
    assert (row / "log.txt").read_text().count("\n$ ") == 2


def test_checks_have_a_process_of_their_own():
    with own_process() as call:
        first, second = call(os.getpid), call(os.getpid)
        with pytest.raises(ValueError, match="invalid literal"):
            call(int, "what goes wrong there is raised here")
    assert first == second != os.getpid()
