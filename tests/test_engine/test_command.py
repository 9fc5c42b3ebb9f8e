import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import mmdet
import pytest
import torch
from helpers import CHECKPOINT, ROOT, in_processes, process_group
from mmengine.config import Config
from mmengine.hooks import EMAHook
from quick_command import QUICK, quantize

from apq_mmdet.calibration import mlp_refit
from apq_mmdet.calibration.distributed import SHARD, own_images
from apq_mmdet.engine import command
from apq_mmdet.engine.quantized_config import COCO_ITEMS, load_recipe, quantized_config

TEST_TOOL = Path(mmdet.__file__).parent / ".mim" / "tools" / "test.py"


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


def test_feature_error_of_a_run(result, config, tmp_path):
    out = tmp_path / "errors.json"
    line = [sys.executable, str(ROOT / "benchmarks/feature_error.py"), str(config), str(CHECKPOINT), str(result)]
    subprocess.run([*line, "--num-val", "2", "--out", str(out)], check=True, capture_output=True)
    found = json.loads(out.read_text())
    assert found["images"] == 2
    assert 0 < found["relative_error"][result.name] < 0.5


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


def wait_for_blocks(process, folder):
    """Until some blocks are finished and kept."""
    deadline = time.monotonic() + 300
    while len(list((folder / "calibration").glob("*.pth"))) <= 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_float_ap_is_that_of_the_model_with_its_own_activations(result, config, tmp_path, monkeypatch):
    monkeypatch.setattr(mlp_refit, "STEPS", 1)
    options = ["--cfg-options", "model.quant.mlp_refit=True", "model.quant.search.windows=0"]
    assert quantize(config, tmp_path, "--eval-float", "--no-eval", *options) == 0
    measured = [json.loads((folder / "report.json").read_text())["metrics"]["float"] for folder in (result, tmp_path)]
    assert measured[0] == measured[1]


def test_killed_and_resumed_gives_the_same_bytes(result, config, tmp_path):
    args = [sys.executable, ROOT / "tools/quantize_det.py", config, CHECKPOINT, "--work-dir", tmp_path, *QUICK]
    process = subprocess.Popen([*args, "--no-eval"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_blocks(process, tmp_path)
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


def test_quantizing_twice_is_refused(result, config, tmp_path, capsys):
    code = command.main([str(config), str(result / "quantized.pth"), "--work-dir", str(tmp_path)])
    assert code == 2
    assert "already quantized" in capsys.readouterr().err


def test_averaged_weights_of_training_do_not_meet_the_evaluation(config, tmp_path):
    hook = "custom_hooks=[dict(type='EMAHook', update_buffers=True)]"
    (tmp_path / "ema.py").write_text(f"_base_ = '{config}'\n{hook}\n")
    line = [str(tmp_path / "ema.py"), str(CHECKPOINT), "--work-dir", str(tmp_path / "w"), *QUICK]
    runner = command.build_runner(command.build_config(command.build_parser().parse_args(line)))
    assert not any(isinstance(hook, EMAHook) for hook in runner.hooks)


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


def test_calibrating_on_evaluated_images_when_asked_for_is_reported(config, data, result, tmp_path):
    assert quantize(config, tmp_path, "--calib-dir", data / "val", "--allow-overlap") == 0
    seen = [json.loads((d / "report.json").read_text())["evaluated_calibration_images"] for d in (tmp_path, result)]
    assert seen[0] > 0
    assert seen[1] == 0


def test_resuming_another_run_is_refused(result, config, capsys):
    states = (result / "calibration" / "run.json").read_text()
    for key, options in {
        "quant": ["--a-bits", "6"],
        "seed": ["--seed", "1"],
        "model": ["--cfg-options", "model.test_cfg.rcnn.score_thr=0.1"],
        "pipeline": [
            "--cfg-options",
            "test_pipeline.1.scale=(96,96)",
            "test_dataloader.dataset.pipeline.1.scale=(96,96)",
        ],
    }.items():
        assert quantize(config, result, "--resume", "--no-eval", *options) == 2
        assert re.search(rf"belongs to another run, it differs in [^;]*\b{key}\b", capsys.readouterr().err)
    assert (result / "calibration" / "run.json").read_text() == states


def test_resuming_with_another_checkpoint_is_refused(result, config, checkpoint, tmp_path, capsys):
    torch.save({**checkpoint, "meta": {**checkpoint["meta"], "epoch": 99}}, tmp_path / "other.pth")
    line = [str(config), str(tmp_path / "other.pth"), "--work-dir", str(result), *QUICK, "--resume", "--no-eval"]
    assert command.main(line) == 2
    assert "differs in checkpoint_sha256;" in capsys.readouterr().err


def test_a_finished_run_may_be_repeated(result, config):
    assert quantize(config, result, "--dry-run", "--no-eval") == 0  # else it would have to be resumed or deleted


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--scope detector" in text
    assert "exit codes" in text


def process_of_rank(rank, launcher):
    """Its id, among those that torchrun has started."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # one that has ended meanwhile
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and b"\0RANK=%d\0" % rank in b"\0" + (folder / "environ").read_bytes():
                return int(folder.name)
    raise LookupError(f"no process of rank {rank}")


def test_two_processes_of_which_one_is_killed_go_on_to_the_same_bytes_and_ap(config, tmp_path):
    images = ["--num-calib", str(SHARD + 1)]
    assert own_images(SHARD + 1, rank=1, processes=2) == [SHARD]  # the second process has an image, too
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert quantize(config, alone, *images) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    args = [ROOT / "tools/quantize_det.py", config, CHECKPOINT, "--work-dir", together, *QUICK, *images]
    args += ["--launcher", "pytorch", "--memory-budget", "0.001"]  # so small that captures go to disk
    run = subprocess.Popen([*launch, *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_blocks(run, together)
        os.kill(process_of_rank(1, run.pid), signal.SIGKILL)
        assert run.wait(120) != 0
    finally:
        run.terminate()  # which ends its processes
    assert not (together / "quantized.pth").exists()
    subprocess.run([*launch, *args, "--resume"], check=True, capture_output=True)
    assert (together / "quantized.pth").read_bytes() == (alone / "quantized.pth").read_bytes()
    metrics = [json.loads((folder / "report.json").read_text())["metrics"] for folder in (alone, together)]
    assert metrics[0]["quantized"] == metrics[1]["quantized"]


def wrap(rank, processes, port, file):
    """What a Runner of several processes on a CPU makes of a model with SyncBN: its modules' classes."""
    with process_group(rank, processes, port):
        os.environ["LOCAL_RANK"] = str(rank)
        runner = object.__new__(command._Runner)
        runner._distributed, runner.cfg = True, Config()
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.SyncBatchNorm(3)).eval()
        wrapped = runner.wrap_model(dict(type="MMDistributedDataParallel", device_ids=None), model)
        wrapped.module(torch.ones(1, 3, 2, 2))
        torch.save([type(module).__name__ for module in wrapped.module], file)


def test_several_processes_on_a_cpu_take_a_model_with_syncbn(tmp_path, free_port):
    """Such as those of Cascade configs, which torch's wrapper refuses there."""
    in_processes(wrap, 1, free_port, str(tmp_path / "classes"))
    assert torch.load(tmp_path / "classes") == ["Conv2d", "_BatchNormXd"]


@pytest.mark.parametrize("launcher", ["mpi", "slurm"])
def test_processes_of_another_launcher(launcher, monkeypatch):
    """Each knows its rank as mpirun tells it, and joins the others on a CPU as torch wants to be told."""
    joined = []
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **how: joined.append((backend, how)))
    told = dict(zip(command.LAUNCHER_VARIABLES[launcher], ("1", "2", "1"), strict=True))
    cfg = Config(dict(launcher=launcher))
    with patch.dict(os.environ, told), patch.object(command, "get_device", lambda: "cpu"):
        command.prepare_launcher(cfg)
        ranks = [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    assert ranks == ["1", "2", "1"]
    # evaluations may take longer than the half an hour that torch waits
    assert joined == [("gloo", dict(timeout=timedelta(hours=2)))]
    assert cfg.model_wrapper_cfg.device_ids is None


def test_on_gpus_mmengine_joins_the_processes_with_nccl():
    cfg = Config(dict(launcher="pytorch", env_cfg=dict(cudnn_benchmark=True)))
    told = dict(zip(command.LAUNCHER_VARIABLES["pytorch"], ("1", "2", "1"), strict=True))
    with patch.dict(os.environ, told), patch.object(command, "get_device", lambda: "cuda"):
        command.prepare_launcher(cfg)
    assert cfg.env_cfg == dict(cudnn_benchmark=True, dist_cfg=dict(backend="nccl", timeout=2 * 3600))
