import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mmdet
import pytest
import torch
from helpers import CHECKPOINT, ROOT
from mmengine.config import Config

from apq_mmdet.engine import command
from apq_mmdet.engine.quantized_config import COCO_ITEMS, load_recipe, quantized_config

TEST_TOOL = Path(mmdet.__file__).parent / ".mim" / "tools" / "test.py"
QUICK = [
    "--recipe",
    str(Path(__file__).with_name("quick.py")),
    "--w-bits",
    "4",
    "--a-bits",
    "4",
    "--num-calib",
    "2",
    "--device",
    "cpu",
]


def quantize(config, work_dir, *options):
    return command.main([str(config), str(CHECKPOINT), "--work-dir", str(work_dir), *QUICK, *map(str, options)])


@pytest.fixture(scope="module")
def result(config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp("whole")
    assert quantize(config, work_dir, "--eval-float") == 0
    return work_dir


def test_what_a_run_leaves(result):
    report = json.loads((result / "report.json").read_text())
    for kind in ("float", "quantized"):
        metrics = report["metrics"][kind]
        assert {f"coco/{t}_{item}" for t in ("bbox", "segm") for item in COCO_ITEMS} <= set(metrics)
    assert report["metrics"]["float"]["coco/bbox_mAP"] > 0.1
    assert report["metrics"]["quantized"] != report["metrics"]["float"]
    assert len(report["calibration_images"]) == 2
    assert report["blocks"][0]["seconds"] > 0
    assert report["peak_memory"]["host_bytes"] > 1e8
    assert report["versions"]["mmdet"] == mmdet.__version__
    assert {"layer", "role", "bits", "reason"} <= set(report["layers"][0])
    # of each 4-bit weight 3.5 bytes of float32 are saved; scales and bookkeeping take less than a tenth of that
    weights = sum(r["elements"] for r in report["layers"] if r["bits"] and r["role"] == "weight")
    state = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    float_bytes = sum(4 * v.numel() for v in state.values())
    assert report["sizes"]["quantized_checkpoint_bytes"] < float_bytes - 0.9 * 3.5 * weights


def test_weights_take_half_a_byte(result):
    content = torch.load(result / "quantized.pth", weights_only=True)
    assert content["meta"]["apq_mmdet"]["format_version"] == 2
    assert len(content["meta"]["dataset_meta"]["classes"]) == 8
    key = "backbone.stages.3.blocks.0.ffn.layers.0.0"
    assert f"{key}.weight" not in content["state_dict"]
    assert content["state_dict"][f"{key}.weight_codes"].shape == (256 * 1024 // 2,)


def test_mmdets_own_tool_gives_the_same_ap(result, tmp_path):
    run = subprocess.run(
        [sys.executable, TEST_TOOL, result / "config.py", result / "quantized.pth", "--work-dir", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = dict(re.findall(r"(coco/\w+[\w@]*): (-?[\d.]+)", run.stdout + run.stderr))
    expected = json.loads((result / "report.json").read_text())["metrics"]["quantized"]
    assert len(measured) >= 24
    assert {key: float(value) for key, value in measured.items()} == pytest.approx(
        {key: round(expected[key], 4) for key in measured}, abs=1e-9
    )


def test_detector_apis(result, data):
    from mmdet.apis import DetInferencer, inference_detector, init_detector

    model = init_detector(str(result / "config.py"), str(result / "quantized.pth"), device="cpu")
    assert model.dataset_meta["classes"][0] == "target"
    image = str(next((data / "val").iterdir()))
    found = inference_detector(model, image).pred_instances
    assert len(found) > 0
    inferencer = DetInferencer(str(result / "config.py"), str(result / "quantized.pth"), device="cpu")
    scores = inferencer(image, no_save_vis=True)["predictions"][0]["scores"]
    assert scores == pytest.approx(found.scores.tolist())


def test_killed_twice_and_resumed_gives_the_same_bytes(result, config, tmp_path):
    args = [sys.executable, ROOT / "tools/quantize_det.py", config, CHECKPOINT, "--work-dir", tmp_path, *QUICK]
    states = tmp_path / "calibration"
    for kill in range(2):
        process = subprocess.Popen(
            [*args, "--resume", "--no-eval"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while len(list(states.glob("*.pth"))) <= 3 * (kill + 1):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "quantized.pth").exists()
    assert quantize(config, tmp_path, "--resume", "--no-eval") == 0
    assert (tmp_path / "quantized.pth").read_bytes() == (result / "quantized.pth").read_bytes()


def test_folder_of_images_without_annotations(config, data, tmp_path, capsys):
    assert quantize(config, tmp_path, "--calib-dir", data / "train", "--no-eval", "--recipe", "minmax") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(image.endswith((".png", ".jpg")) for image in report["calibration_images"])
    assert "quantized not measured" in capsys.readouterr().out


def test_a_layer_that_saw_nothing_can_stay_float(config, tmp_path, monkeypatch):
    from mmdet.apis import init_detector

    from apq_mmdet.models import distillation

    monkeypatch.setattr(distillation.TwoStageTask, "_mask_rois", lambda *_: (None, None))
    options = ["--recipe", "minmax", "--scope", "detector", "--no-eval"]
    assert quantize(config, tmp_path, *options) == 1
    assert quantize(config, tmp_path, *options, "--cfg-options", "model.quant.on_unseen=float") == 0
    model = init_detector(str(tmp_path / "config.py"), str(tmp_path / "quantized.pth"), device="cpu")
    layer = next(r for r in model.quantization_table if r.layer == "roi_head.mask_head.conv_logits")
    assert layer.bits is None


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


def test_quantizing_twice_is_refused(result, config, tmp_path, capsys):
    code = command.main([str(config), str(result / "quantized.pth"), "--work-dir", str(tmp_path)])
    assert code == 2
    assert "already quantized" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--w-bits", "9"], "--w-bits: bits must be a whole number from 2 to 8, got 9"),
        (["--recipe", "aqp"], "did you mean 'apq'"),
        (["--recipe", "none.py"], "recipe file none.py does not exist"),
        (["--num-calib", "0"], "num_calib must be at least 1"),
        (["--num-calib", "99"], "99 calibration images asked for, the training set holds 8"),
        (["--calib-dir", "nowhere"], "calibration folder nowhere does not exist"),
        (["--device", "tpu"], "--device must be"),
        (["--memory-budget", "0"], "--memory-budget must be a number of GiB above 0, got 0"),
        (["--memory-budget", "nan"], "--memory-budget must be a number of GiB above 0, got nan"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--cfg-options", "quant.w_bits=4"], "quant.w_bits would change nothing here: write model.quant.w_bits"),
        (["--cfg-options", "test_dataloader=None"], "the config has no test_dataloader"),
        (["--launcher", "pytorch"], "RANK is not set; start the command with torchrun"),
        (["--launcher", "slurm"], "SLURM_PROCID is not set; start the command with srun"),
        (["--launcher", "mpi"], "OMPI_COMM_WORLD_RANK is not set; start the command with mpirun"),
        (["--cfg-options", "model.quant.overrides.mine.pattern=*.qvk"], "'\\*.qvk'.*matches no layer"),
        (["--cfg-options", "model.quant.overrides.mine=1"], "overrides.mine: expected dict"),
        (["--cfg-options", "test_pipeline.99.type=Resize"], "--cfg-options: .*99"),
        (["--cfg-options", "model.backbone.embed_dim=32"], "cannot be built.*embed_dim"),
        (["--cfg-options", "model.quant.serach=1"], "did you mean 'search'"),
        (["--cfg-options", "train_dataloader.dataset.ann_file=no.json"], "training set cannot be read.*--calib-dir"),
        (["--cfg-options", "test_dataloader.dataset.ann_file=no.json"], "evaluation data cannot be read.*--no-eval"),
    ],
)
def test_bad_options(config, tmp_path, capsys, options, message):
    assert quantize(config, tmp_path / "w", *options) == 2
    assert re.search(message, capsys.readouterr().err)


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


def test_averaged_weights_of_training_do_not_meet_the_evaluation(result, config, tmp_path):
    hook = "custom_hooks=[dict(type='EMAHook', update_buffers=True)]"
    (tmp_path / "ema.py").write_text(f"_base_ = '{config}'\n{hook}\n")
    assert quantize(tmp_path / "ema.py", tmp_path / "w") == 0
    plain, ema = (json.loads((d / "report.json").read_text())["metrics"] for d in (result, tmp_path / "w"))
    assert ema["quantized"] == plain["quantized"]


def test_a_backbones_own_quant_is_the_recipe(config, tmp_path):
    (tmp_path / "backbone.py").write_text(
        f"_base_ = ['{config}', '{ROOT}/configs/_base_/recipes/minmax.py']\n"
        "quant = dict(scope='detector', overrides=dict(mine=dict(pattern='stages.0.*', float=True)))\n"
        "model = dict(backbone=dict(type='apq_mmdet.SwinTransformer', quant={{_base_.quant}}))\n"
    )
    code = command.main(
        [
            str(tmp_path / "backbone.py"),
            str(CHECKPOINT),
            "--work-dir",
            str(tmp_path / "w"),
            "--no-eval",
            "--num-calib",
            "1",
            "--cfg-options",
            "model.quant.overrides.mine.pattern=backbone.stages.0.*",
            "model.quant.overrides.mine.float=True",
        ]
    )
    assert code == 0
    rows = json.loads((tmp_path / "w" / "report.json").read_text())["layers"]
    assert {r["bits"] for r in rows if r["layer"].startswith("backbone.stages.0.blocks")} == {None}
    assert {r["layer"].split(".")[0] for r in rows if r["bits"]} == {"backbone"}


def test_rules_of_a_backbones_own_quant_speak_of_its_layers():
    rules = dict(first=dict(pattern="stages.0.*", type="mse"), last=dict(pattern=r"re:stages\.3\..*", type="mse"))
    quant = dict(load_recipe("apq"), overrides=dict(mine=dict(pattern="stages.1.*", bits=8)))
    quant["search"]["objectives"] = rules
    cfg = Config(dict(model=dict(type="MaskRCNN", backbone=dict(type="apq_mmdet.SwinTransformer", quant=quant))))
    made = quantized_config(cfg, None, {}).model.quant
    assert made.overrides.mine.pattern == "backbone.stages.1.*"
    assert made.search.objectives.first.pattern == "backbone.stages.0.*"
    assert made.search.objectives["last"].pattern == r"re:backbone\.(?:stages\.3\..*)"


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
    assert "not of FCOS; use scope 'backbone'" in capsys.readouterr().err


def test_broken_config(tmp_path, capsys):
    (tmp_path / "broken.py").write_text("model = dict(")
    assert command.main([str(tmp_path / "broken.py"), str(CHECKPOINT), "--work-dir", str(tmp_path)]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_calibrating_on_evaluated_images_is_refused(config, data, tmp_path, capsys):
    assert quantize(config, tmp_path, "--calib-dir", data / "val") == 2
    assert "calibration images are evaluated images" in capsys.readouterr().err


def test_calibrating_on_evaluated_images_when_asked_for_is_reported(config, data, result, tmp_path):
    assert quantize(config, tmp_path, "--calib-dir", data / "val", "--allow-overlap") == 0
    seen = [json.loads((d / "report.json").read_text())["evaluated_calibration_images"] for d in (tmp_path, result)]
    assert seen[0] > 0
    assert seen[1] == 0


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


def test_resuming_another_run_is_refused(result, config, capsys):
    assert quantize(config, result, "--resume", "--a-bits", "6", "--no-eval") == 2
    assert "belongs to another run, it differs in quant" in capsys.readouterr().err


def test_a_failure_in_the_work_is_exit_code_1(config, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("apq_mmdet.engine.ptq_loop.save_quantized", fail)
    assert quantize(config, tmp_path, "--no-eval", "--recipe", "minmax") == 1
    assert "failed: OSError: no space left on device" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--scope detector" in text
    assert "exit codes" in text


def test_two_processes_give_the_same_bytes_and_ap(result, config, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [ROOT / "tools/quantize_det.py", config, CHECKPOINT, "--work-dir", tmp_path, *QUICK]
    subprocess.run([*launch, *args, "--launcher", "pytorch"], check=True, capture_output=True)
    assert (tmp_path / "quantized.pth").read_bytes() == (result / "quantized.pth").read_bytes()
    alone, together = (json.loads((d / "report.json").read_text())["metrics"] for d in (result, tmp_path))
    assert together["quantized"] == alone["quantized"]


def test_processes_of_another_launcher(result, config, tmp_path, free_port):
    """Two processes that know their rank as mpirun tells it; small memory, so that captures go to disk."""
    children = []
    for rank in range(2):
        ranks = {"RANK": rank, "SIZE": 2, "LOCAL_RANK": rank}
        told = {f"OMPI_COMM_WORLD_{name}": str(value) for name, value in ranks.items()}
        line = [sys.executable, ROOT / "tools/quantize_det.py", config, CHECKPOINT, "--work-dir", tmp_path, *QUICK]
        line += ["--no-eval", "--launcher", "mpi", "--memory-budget", "0.001"]
        environment = {**os.environ, **told, "MASTER_PORT": str(free_port)}
        children.append(subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    assert [child.wait(300) for child in children] == [0, 0]
    assert (tmp_path / "quantized.pth").read_bytes() == (result / "quantized.pth").read_bytes()
