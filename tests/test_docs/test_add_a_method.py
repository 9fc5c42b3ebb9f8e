"""docs/add-a-method.md, followed to the letter."""

import os
import re
import subprocess
import sys

from helpers import ROOT

DOCUMENT = ROOT / "docs" / "add-a-method.md"
MOST_LINES = 60
LISTING = re.compile(r"^`([\w.]+)`:\n\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def listings() -> dict[str, str]:
    """The code of each file that the document shows, by name."""
    return dict(LISTING.findall(DOCUMENT.read_text()))


def test_shows_whole_files_in_less_than_sixty_lines():
    shown = listings()
    methods = [name for name in shown if not name.startswith("test_")]
    assert len(methods) == 3
    assert set(shown) == {*methods, *(f"test_{name}" for name in methods)}
    assert DOCUMENT.read_text().count("```python") == len(shown)  # no code without a file name
    assert sum(len(code.splitlines()) for code in shown.values()) < MOST_LINES


def test_the_shown_tests_pass(tmp_path):
    shown = listings()
    for name, code in shown.items():
        (tmp_path / name).write_text(code)
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # as in the root of a checkout
    tests = sorted(name for name in shown if name.startswith("test_"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", *tests]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": "."}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(tests)} passed" in done.stdout


def test_the_files_that_it_names_exist():
    text = DOCUMENT.read_text()
    linked = [DOCUMENT.parent / target for target in re.findall(r"\]\(([^)#]+)\)", text)]
    named = [ROOT / path for path in re.findall(r"`((?:apq_mmdet|tests|tools)/[\w/]+\.py)`", text)]
    assert linked
    assert named
    assert [path for path in linked + named if not path.exists()] == []
