import importlib.util
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT

from apq_mmdet.datasets.demo import demo_image
from apq_mmdet.datasets.preview import PALETTE, draw_instances
from apq_mmdet.datasets.scene import LONG_SIDE


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch):
    """Runs a tool of the demo with options; returns its exit code."""

    def run(name: str, *options: object) -> int:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
        tool = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tool)
        monkeypatch.setattr("sys.argv", [name, *map(str, options)])
        with pytest.raises(SystemExit) as ended:
            tool.main()
        return ended.value.code

    return run


def test_a_model_that_detects_nothing_has_a_line_in_the_demos_table() -> None:
    """mmdet gives no AP of it."""
    spec = importlib.util.spec_from_file_location("demo", ROOT / "tools" / "demo.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    assert demo.row("W2A2", {}, 6.0, 1.0).split() == ["W2A2", *["0.0"] * 4, "6.0", "1s"]


def test_preview(call, tmp_path: Path) -> None:
    assert call("make_demo_data", "--preview", tmp_path / "new" / "sheet.png", "--seed", 1) == 0
    sheet = cv2.imread(str(tmp_path / "new" / "sheet.png"))
    assert sheet.shape[1] == 5 * LONG_SIDE
    for index in range(5):
        image, instances = demo_image(1, "val", index)
        panel = sheet[: image.shape[0], index * LONG_SIDE :][:, : image.shape[1]]
        assert np.array_equal(panel, draw_instances(image, instances))
        for instance in instances:
            x, y, width, height = cv2.boundingRect(instance.mask.astype(np.uint8))
            corner = panel[y + height - 1, x + width - 1]
            assert tuple(corner) in PALETTE  # that of its box, or of one that was drawn over it
        unlike = (panel != image).any(2)
        assert unlike.any()
        assert not unlike.all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("make_demo_data", ["--preview", "sheet.png", "--seed", -1], "--seed must be from 0"),
        ("make_demo_data", ["--preview", "sheet"], "sheet must end in a format of pictures"),
        ("make_demo_data", ["--num-val", 0], "--num-val must be at least 1, got 0"),
        ("demo", ["--num-calib", 0], "--num-calib: expected a whole number >= 1, got 0"),
        ("demo", ["--work-dir", "other"], "holds something other than a demo set"),
    ],
)
def test_bad_input(call, tmp_path: Path, monkeypatch, capsys, name: str, options: list[object], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other" / "data").mkdir(parents=True)
    (tmp_path / "other" / "data" / "something").touch()
    assert call(name, *options) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"other"}


def test_a_second_demo_in_a_folder_waits_for_the_first(call, tmp_path: Path, capsys) -> None:
    pytest.importorskip("fcntl")
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    line = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
        first.stdout.readline()
        assert call("demo", "--work-dir", tmp_path) == 2
        first.communicate(b"\n")
    assert "another demo is running" in capsys.readouterr().err
