"""What a command finds in the way of its outputs: files of the user's stay, those of a run change together."""

import importlib.util
from pathlib import Path

import pytest
from helpers import CHECKPOINT, ROOT
from quick_command import RECIPE, quantize

from apq_mmdet.engine import command
from apq_mmdet.errors import BadInputError

FLOAT = ROOT / "configs" / "demo" / "mask-rcnn_swin-demo.py"


@pytest.fixture
def mine(tmp_path) -> Path:
    """A work dir in which a user keeps a config.py."""
    (tmp_path / "config.py").write_text(f"_base_ = '{FLOAT}'\n")
    return tmp_path


def check(folder: Path, config: Path = FLOAT, *options: str) -> None:
    """Make the config of a run, and whatever checks come with it."""
    line = [str(config), str(CHECKPOINT), "--work-dir", str(folder), *options]
    command.build_config(command.build_parser().parse_args(line))


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_config_that_no_run_has_written_is_not_replaced(mine, capsys, options):
    before = (mine / "config.py").read_bytes()
    assert quantize(FLOAT, mine, *options) == 2
    assert "holds a config.py that was not written by a run, and would be replaced" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in mine.iterdir()} == {mine / "config.py": before}


@pytest.mark.parametrize("beside", ["quantized.pth", "calibration/run.json"])
def test_a_run_can_be_repeated_where_it_was_finished_or_killed(mine, beside):
    (mine / beside).parent.mkdir(exist_ok=True)
    (mine / beside).touch()
    check(mine)


@pytest.mark.parametrize(
    ("how", "name"),
    [
        ("a base", "config.py"),
        ("a base of a base", "run_config.py"),
        ("the recipe", "config.py"),
        ("a base of the recipe", "run_config.py"),
    ],
)
def test_bases_and_recipes_are_not_overwritten(tmp_path, how, name):
    (tmp_path / "quantized.pth").touch()
    written, config, options = tmp_path / name, tmp_path / "mine.py", []
    written.write_text(f"_base_ = '{RECIPE if 'recipe' in how else FLOAT}'\n")
    config.write_text(f"_base_ = './{name}'\n")
    if how == "a base of a base":
        config = tmp_path / "derived.py"
        config.write_text("_base_ = 'mine.py'\n")
    elif how == "the recipe":
        config, options = FLOAT, ["--recipe", str(written)]
    elif how == "a base of the recipe":
        config, options = FLOAT, ["--recipe", str(config)]
    with pytest.raises(BadInputError, match=f"--work-dir: the run would overwrite .*{name}; write elsewhere"):
        check(tmp_path, config, *options)


def test_the_config_of_a_run_comes_with_its_weights(config, tmp_path, interrupted_at):
    """Whatever comes to nothing before leaves that of the run before."""
    (tmp_path / "quantized.pth").touch()
    (tmp_path / "run_config.py").write_text("earlier = True\n")
    interrupted_at(command.Runner, "test")
    assert quantize(config, tmp_path, "--no-eval") == 1
    assert (tmp_path / "run_config.py").read_text() == "earlier = True\n"


@pytest.mark.parametrize("which", ["config", "base", "checkpoint"])
def test_a_stressed_checkpoint_does_not_overwrite_what_it_is_made_of(tmp_path, capsys, which):
    spec = importlib.util.spec_from_file_location("stress_detector", ROOT / "tools" / "stress_detector.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    given = {"config": tmp_path / "mine.py", "base": tmp_path / "base.py", "checkpoint": tmp_path / "float.pth"}
    given["base"].write_text(f"_base_ = '{FLOAT}'\n")
    given["config"].write_text("_base_ = './base.py'\n")
    given["checkpoint"].write_bytes(b"weights")
    before = {path: path.read_bytes() for path in given.values()}
    assert tool.main([str(given["config"]), str(given["checkpoint"]), str(given[which])]) == 2
    assert "OUT: the run would overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
