"""What tools/quantize_det.py says of bad input, and its exit codes."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import CHECKPOINT, ROOT
from mmengine.config import Config
from quick_command import QUICK, quantize

from apq_mmdet.engine import command
from apq_mmdet.engine.quantized_config import load_recipe, quantized_config


def damaged(checkpoint, tmp_path, change):
    state = dict(checkpoint["state_dict"])
    change(state)
    path = tmp_path / "damaged.pth"
    torch.save({"meta": {}, "state_dict": state}, path)
    return path


def drop(state):
    del state["backbone.patch_embed.projection.weight"]


def widen(state):
    state["backbone.norm0.weight"] = torch.ones(7)


def add(state):
    state["backbone.stages.2.blocks.6.norm1.weight"] = torch.ones(1)


def poison(state):
    state["neck.fpn_convs.0.conv.bias"] = torch.full((64,), float("nan"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "another architecture.*lacks backbone.patch_embed.projection.weight"),
        (widen, "another architecture.*backbone.norm0.weight \\(7,\\) instead of \\(32,\\)"),
        (add, "another architecture.*unknown backbone.stages.2.blocks.6"),
        (poison, "neck.fpn_convs.0.conv.bias' hold NaN"),
    ],
)
def test_bad_checkpoints(config, checkpoint, tmp_path, capsys, change, message):
    path = damaged(checkpoint, tmp_path, change)
    assert command.main([str(config), str(path), "--work-dir", str(tmp_path / "w"), *QUICK]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_pickle_with_code_is_refused(config, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    assert command.main([str(config), str(tmp_path / "evil.pth"), "--work-dir", str(tmp_path)]) == 2
    assert "cannot be loaded safely" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--w-bits", "9"], "--w-bits: bits must be a whole number from 2 to 8, got 9"),
        (["--recipe", "aqp"], "did you mean 'apq'"),
        (["--recipe", "none.py"], "recipe file none.py does not exist"),
        (["--num-calib", "0"], "num_calib must be at least 1"),
        (["--num-calib", "99"], "99 calibration images asked for, the training set holds 9"),
        (["--calib-dir", "nowhere"], "calibration folder nowhere does not exist"),
        (["--device", "tpu"], "--device must be"),
        (["--device", "cuda:99"], r"--device cuda:99: torch sees \d+ CUDA devices"),
        (["--memory-budget", "0"], "--memory-budget must be a number of GiB above 0, got 0"),
        (["--memory-budget", "nan"], "--memory-budget must be a number of GiB above 0, got nan"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--cfg-options", "quant.w_bits=4"], "quant.w_bits would change nothing here: write model.quant.w_bits"),
        (["--cfg-options", "data_preprocessor.mean=[0,0,0]"], "write model.data_preprocessor.mean"),
        (["--cfg-options", "work_dir=there"], "work_dir would change nothing here: use --work-dir"),
        (["--cfg-options", "load_from=a.pth"], "load_from would .*: the checkpoint is the second argument"),
        (["--cfg-options", "randomness.seed=7"], "randomness.seed would change nothing here: use --seed"),
        (["--cfg-options", "test_cfg.type=Mine"], "test_cfg.type would .* a test loop of its own"),
        (["--cfg-options", "test_dataloader=None"], "the config has no test_dataloader"),
        (["--launcher", "pytorch"], "RANK is not set; start the command with torchrun"),
        (["--launcher", "slurm"], "SLURM_PROCID is not set; start the command with srun"),
        (["--launcher", "mpi"], "OMPI_COMM_WORLD_RANK is not set; start the command with mpirun"),
        (["--cfg-options", "model.quant.overrides.mine.pattern=*.qvk"], "'\\*.qvk'.*matches no layer"),
        (["--cfg-options", "model.quant.overrides.mine=1"], "overrides.mine: expected dict"),
        (["--cfg-options", "test_pipeline.99.type=Resize"], "--cfg-options: .*99"),
        (["--cfg-options", "model.backbone.embed_dim=32"], "cannot be built.*embed_dim"),
        (["--cfg-options", "model.quant.serach=1"], "did you mean 'search'"),
        (["--recipe", "apq", "--cfg-options", "model.quant.search.grids.MatMul=(0.1,0.5,4)"], "holds no range factor"),
        (["--cfg-options", "train_dataloader.dataset.ann_file=no.json"], "training set cannot be read.*--calib-dir"),
        (["--cfg-options", "test_dataloader.dataset.ann_file=no.json"], "evaluation data cannot be read.*--no-eval"),
    ],
)
def test_bad_options(config, tmp_path, capsys, options, message):
    assert quantize(config, tmp_path / "w", *options) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "w" / "calibration").exists()  # where work begins


@pytest.mark.parametrize("which", ["config", "checkpoint"])
def test_missing_files(config, tmp_path, capsys, which):
    args = {"config": str(config), "checkpoint": str(CHECKPOINT)} | {which: str(tmp_path / "absent.py")}
    assert command.main([args["config"], args["checkpoint"], "--work-dir", str(tmp_path)]) == 2
    assert "absent.py does not exist" in capsys.readouterr().err


def test_work_dir_that_is_a_file(config, tmp_path, capsys):
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        assert quantize(config, tmp_path / folder) == 2
        assert re.search(r"--work-dir .*: .*file is a file", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("which", "name"), [("config", "config.py"), ("config", "run_config.py"), ("checkpoint", "quantized.pth")]
)
def test_what_a_run_reads_is_not_overwritten(config, tmp_path, capsys, which, name):
    own = tmp_path / name
    own.write_bytes(Path({"config": config, "checkpoint": CHECKPOINT}[which]).read_bytes())
    before = own.read_bytes()
    args = {"config": str(config), "checkpoint": str(CHECKPOINT)} | {which: str(own)}
    assert command.main([args["config"], args["checkpoint"], "--work-dir", f"{tmp_path}/../{tmp_path.name}"]) == 2
    assert f"the run would overwrite {own}" in capsys.readouterr().err
    assert own.read_bytes() == before


def test_a_refused_run_leaves_what_an_earlier_one_wrote(config, tmp_path, capsys):
    (tmp_path / "quantized.pth").touch()
    for name in ("config.py", "run_config.py"):
        (tmp_path / name).write_text("earlier = True\n")
    float_config = tmp_path / "configs" / "config.py"
    float_config.parent.mkdir()
    float_config.write_text(f"_base_ = {str(config)!r}\n")
    assert quantize(float_config, tmp_path, "--dry-run", "--num-calib", "999") == 2
    assert "999 calibration images asked for" in capsys.readouterr().err
    for name in ("config.py", "run_config.py"):
        assert (tmp_path / name).read_text() == "earlier = True\n"


def test_a_work_dir_whose_folder_for_blocks_holds_the_images(config, data, tmp_path, capsys):
    """They were deleted once."""
    images = shutil.copytree(data / "train", tmp_path / "calibration")
    before = sorted(images.iterdir())
    assert quantize(config, tmp_path, "--calib-dir", images, "--no-eval") == 2
    assert "use another --work-dir" in capsys.readouterr().err
    assert sorted(images.iterdir()) == before


@pytest.mark.parametrize("option", ["noequals", "a=1 noequals"])
def test_options_without_a_value(config, tmp_path, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        quantize(config, tmp_path, "--cfg-options", *option.split())
    assert "--cfg-options: expected key=value, got 'noequals'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["a=[1,(2,3]", "a=(1,2"])
def test_brackets_that_do_not_match(config, tmp_path, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        quantize(config, tmp_path, "--cfg-options", option)
    assert "--cfg-options: Imbalanced brackets exist" in capsys.readouterr().err


def test_another_recipe_keeps_bits_scope_and_overrides_of_the_config():
    cfg = Config.fromfile(ROOT / "configs/demo/mask-rcnn_swin-demo.py")
    mine = dict(mine=dict(pattern="*.fc_cls", float=True))
    cfg.model.quant = {**load_recipe("minmax"), "w_bits": 4, "a_bits": 6, "scope": "detector", "overrides": mine}
    cfg.quant = load_recipe("minmax")
    made = quantized_config(cfg, "apq", dict(a_bits=3))
    assert "quant" not in made  # two of them could be taken for each other
    kept = [made.model.quant[key] for key in ("recipe", "w_bits", "a_bits", "scope", "overrides")]
    assert kept == ["apq", 4, 3, "detector", mine]


def test_classes_that_the_annotations_do_not_have(config, tmp_path, capsys):
    path = tmp_path / "other.py"
    classes = "dict(dataset=dict(metainfo=dict(classes=('unicorn',))))"
    path.write_text(f"_base_ = '{config}'\ntrain_dataloader = {classes}\n")
    assert quantize(path, tmp_path / "w", "--no-eval") == 2
    assert "do the classes of its metainfo stand in its annotations?" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["quant = dict(", "quant = 3"])
def test_broken_recipe(config, tmp_path, capsys, text):
    (tmp_path / "broken.py").write_text(text)
    assert quantize(config, tmp_path / "w", "--recipe", tmp_path / "broken.py") == 2
    assert "broken.py" in capsys.readouterr().err


def test_broken_annotations(config, copied_data, tmp_path, capsys):
    (copied_data / "annotations" / "instances_train.json").write_text("{")
    options = ["--cfg-options", f"train_dataloader.dataset.data_root={copied_data}/"]
    assert quantize(config, tmp_path / "w", *options) == 2
    assert "training set cannot be read" in capsys.readouterr().err


def test_detectors_whose_heads_cannot_be_run_refuse_scope_detector(config, tmp_path, capsys):
    (tmp_path / "fcos.py").write_text(
        "_base_ = ['mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py']\nmodel = dict(backbone=dict(init_cfg=None))\n"
    )
    from mmdet.registry import MODELS
    from mmengine.config import Config

    model = MODELS.build(Config.fromfile(tmp_path / "fcos.py").model)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "fcos.pth")
    args = [str(tmp_path / "fcos.py"), str(tmp_path / "fcos.pth"), "--work-dir", str(tmp_path / "w"), "--no-eval"]
    images = next(line for line in Path(config).read_text().split("'") if line.endswith("/data/"))
    args += ["--calib-dir", f"{images}train", "--num-calib", "1", "--scope", "detector"]
    assert command.main(args) == 2
    assert "not those of this FCOS (FCOSHead); use scope 'backbone'" in capsys.readouterr().err


def test_broken_config(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("model = dict(")
    assert command.main([str(tmp_path / "broken.py"), str(CHECKPOINT), "--work-dir", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_calibrating_on_evaluated_images_is_refused(config, data, tmp_path, capsys):
    assert quantize(config, tmp_path, "--calib-dir", data / "val") == 2
    assert "calibration images are evaluated images" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_damaged_and_missing_images(config, copied_data, tmp_path, capsys, split):
    for path in (copied_data / split).iterdir():
        path.write_bytes(path.read_bytes()[:40])
    options = ["--cfg-options"]
    options += [f"{s}_dataloader.dataset.data_root={copied_data}/" for s in ("train", "test")]
    if split == "val":
        for path in (copied_data / split).iterdir():
            path.unlink()
    assert quantize(config, tmp_path / "w", *options) == 2
    message = "calibration image .* cannot be read" if split == "train" else "evaluation image .* does not exist"
    assert re.search(message, capsys.readouterr().err)


def test_an_interrupt_is_exit_code_1_and_says_how_to_go_on(config, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("apq_mmdet.engine.ptq_loop.calibrate", interrupt)
    assert quantize(config, tmp_path, "--no-eval", "--recipe", "minmax") == 1
    assert "interrupted; where the command knows --resume, that goes on" in capsys.readouterr().err


def test_a_failure_in_the_work_is_exit_code_1(config, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("apq_mmdet.engine.ptq_loop.save_quantized", fail)
    assert quantize(config, tmp_path, "--no-eval", "--recipe", "minmax") == 1
    assert "failed: OSError: no space left on device" in capsys.readouterr().err
