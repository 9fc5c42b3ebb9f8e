"""Configs, classes and checkpoints that are not mmdet's own."""

import functools
import json
import re
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from helpers import ROOT, recipe
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from quick_command import QUICK, quantize
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.engine import command
from apq_mmdet.engine.block_states import BlockStatesOnDisk
from apq_mmdet.engine.checkpoint import load_float_weights, save_quantized
from apq_mmdet.engine.float_config import read_config
from apq_mmdet.engine.quantized_config import quantized_config, standalone_config
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import write_json
from apq_mmdet.layers import packed_state_dict, quantize_model
from apq_mmdet.layers.activation_checkpointing import disable_activation_checkpointing
from apq_mmdet.models.detectors import QuantizedDetector
from apq_mmdet.registry import MODELS
from apq_mmdet.report import summary_line

FLOAT = ROOT / "configs/demo/mask-rcnn_swin-demo.py"
PACKAGE = """
from mmdet.models.detectors import RetinaNet as Mmdets
from mmdet.registry import MODELS
{decorator}
class {name}(Mmdets):
    own = True
"""
LAZY = """
from {package} import {name} as Detector
from mmdet.models.backbones import SwinTransformer
from mmdet.models.dense_heads import RetinaHead
head = dict(type=RetinaHead, num_classes=3, in_channels=96)
model = dict(type=Detector, backbone=dict(type=SwinTransformer), bbox_head=head)
"""


@pytest.mark.parametrize("name", ["RetinaNet", "Mine", "Registered"])
def test_detectors_of_other_packages_stay_what_they_are(name, tmp_path, monkeypatch):
    """Under a name of mmdet's too, and without being registered."""
    package = f"package_of_{name.lower()}"
    decorator = "@MODELS.register_module()" if name == "Registered" else ""
    (tmp_path / f"{package}.py").write_text(PACKAGE.format(name=name, decorator=decorator))
    (tmp_path / "lazy.py").write_text(LAZY.format(package=package, name=name))
    monkeypatch.syspath_prepend(str(tmp_path))
    made = quantized_config(read_config(str(tmp_path / "lazy.py")), "minmax", {}).model.type
    assert made == f"apq_mmdet.{package}.{name}"
    found = MODELS.get(made)
    assert found.own
    assert issubclass(found, QuantizedDetector)
    again = quantized_config(Config(dict(model=dict(type=made))), "minmax", {}).model.type
    assert again == made


class Versioned(nn.Module):
    """Takes weights of its first version the other way round."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x):
        return x * self.weight

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if (metadata.get("version") or 1) < 2:
            state[f"{prefix}weight"] = state[f"{prefix}weight"].flip(0)
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("wrapped", [False, True])
def test_versions_of_modules_come_along(wrapped, tmp_path):
    model = nn.Sequential(OrderedDict(own=Versioned(), linear=nn.Linear(4, 4)))
    state = nn.ModuleDict({"module": model}).state_dict() if wrapped else model.state_dict()
    torch.save({"state_dict": state}, tmp_path / "float.pth")
    quantize_model(model, recipe("minmax").policy)
    load_float_weights(model, str(tmp_path / "float.pth"))
    assert model.own.weight.tolist() == [0, 1, 2, 3]
    calibrate(model, [torch.randn(2, 4)], recipe("minmax"))
    save_quantized(model, tmp_path / "quantized.pth", {})
    load_checkpoint(model, str(tmp_path / "quantized.pth"))
    assert model.own.weight.tolist() == [0, 1, 2, 3]


def test_checkpoints_may_lack_what_batch_norms_count(tmp_path):
    """As those of torch before 0.4.1 do."""
    model = nn.Sequential(nn.BatchNorm2d(3))
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(state) == 4
    state["0.weight"] = torch.tensor([1.0, 2.0, 3.0])
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    load_float_weights(model, str(tmp_path / "old.pth"))
    assert model[0].weight.tolist() == [1, 2, 3]


def test_tensors_of_several_names_are_saved_once(tmp_path):
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
            self.again, self.norm = nn.ModuleList([*self.convs]), nn.LayerNorm(8)
            self.norm_again = self.norm

        def forward(self, x):
            return self.norm(self.again[1](self.again[0](x)))

    model = Levels()
    quantize_model(model, recipe("minmax").policy)
    calibrate(model, [torch.randn(2, 8)], recipe("minmax"))
    state = packed_state_dict(model)
    for a, b in (("convs.0.weight_codes", "again.0.weight_codes"), ("norm.weight", "norm_again.weight")):
        assert state[a] is state[b]
    assert len({value.data_ptr() for value in state.values()}) == len({id(value) for value in state.values()})
    assert state["convs.0.bias"] is not state["convs.1.bias"]
    assert state["norm.weight"] is not model.norm.weight
    other = Levels()
    quantize_model(other, recipe("minmax").policy)
    other.load_state_dict(state)
    x = torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_what_only_helped_to_write_a_config_is_left_out(tmp_path):
    (tmp_path / "helped.py").write_text(
        f"_base_ = '{FLOAT}'\nfrom pathlib import Path\nimport torch\nroot = Path('data')\nkind = torch.float16\n"
        "import numpy as np\n"
        "train_dataloader = dict(dataset=dict(data_root=root / 'mine'), batch_size=np.int64(3))\n"
        "model = dict(backbone=dict(out_indices=range(4)))\n"
    )
    cfg = standalone_config(quantized_config(read_config(str(tmp_path / "helped.py")), "minmax", {}), [])
    (tmp_path / "left.py").write_text(cfg.pretty_text)
    again = Config.fromfile(tmp_path / "left.py")
    assert again.train_dataloader.dataset.data_root == "data/mine"
    assert (again.train_dataloader.batch_size, list(again.model.backbone.out_indices)) == (3, [0, 1, 2, 3])
    assert "kind" not in again


def test_values_that_no_file_can_hold_are_refused(config, tmp_path, capsys):
    (tmp_path / "infinite.py").write_text(
        f"_base_ = '{config}'\nmodel = dict(test_cfg=dict(rcnn=dict(max_area=float('inf'))))\n"
    )
    assert quantize(tmp_path / "infinite.py", tmp_path / "w", "--no-eval") == 2
    assert "model.test_cfg.rcnn.max_area = inf cannot be written into config.py" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["list", "evaluator"])
def test_metrics_inside_an_evaluator_give_all_numbers(form):
    metric = dict(type="CocoMetric", metric=["bbox"])
    evaluator = [metric] if form == "list" else dict(metrics=[metric])
    cfg = Config(dict(model=dict(type="MaskRCNN"), test_evaluator=evaluator))
    made = quantized_config(cfg, "minmax", {}).test_evaluator
    assert len((made if form == "list" else made.metrics)[0].metric_items) == 12


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: [content], "training set cannot be read: .*; or give a folder with --calib-dir"),
        (lambda content: content["annotations"].append(content["annotations"][0]) or content, "cannot be read: .*Err"),
    ],
)
def test_damaged_annotations_are_bad_input(config, copied_data, tmp_path, capsys, damage, message):
    path = copied_data / "annotations" / "instances_train.json"
    write_json(path, damage(json.loads(path.read_text())))
    options = ["--no-eval", "--cfg-options", f"train_dataloader.dataset.data_root={copied_data}/"]
    assert quantize(config, tmp_path / "w", *options) == 2
    assert re.search(message, capsys.readouterr().err)


def test_microsofts_checkpoints_are_pointed_to_the_converter(checkpoint, config, tmp_path, capsys):
    name = "backbone.patch_embed.projection.weight"
    state = {k.replace("projection", "proj") if k == name else k: v for k, v in checkpoint["state_dict"].items()}
    torch.save({"state_dict": state}, tmp_path / "theirs.pth")
    line = [str(config), str(tmp_path / "theirs.pth"), "--work-dir", str(tmp_path / "w"), *QUICK, "--no-eval"]
    assert command.main(line) == 2
    assert "convert it first: tools/convert_checkpoint.py" in capsys.readouterr().err


def test_a_devices_floats_have_to_be_wide_enough(monkeypatch):
    """mmengine would take Apple's mps, which has no float64, where it is not told another."""
    monkeypatch.setattr("mmengine.device.utils.DEVICE", "mps")
    command.choose_device(None)
    assert command.get_device() == "cpu"


def test_every_kind_of_activation_checkpointing_is_switched_off():
    def _checkpointed_forward(forward, x):
        raise AssertionError("run in a checkpoint")

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].use_checkpoint, model[1].grad_checkpointing = True, True
    model[2].forward = functools.partial(_checkpointed_forward, type(model[2]).forward)  # as fairscale does
    disable_activation_checkpointing(model)
    assert not model[0].use_checkpoint
    assert not model[1].grad_checkpointing
    assert model(torch.zeros(1, 2)).shape == (1, 2)


def test_no_detections_are_told_from_no_measurement():
    report = dict(
        bits=dict(weight=2, activation=2),
        recipe="minmax",
        scope="backbone",
        metrics={"float": None, "quantized": {}},
        sizes=dict(float_checkpoint_bytes=1, quantized_checkpoint_bytes=1),
        calibration_seconds=0,
        seconds=0,
    )
    assert "float not measured | quantized no metrics (nothing detected?)" in summary_line(report)


def test_a_report_is_strict_json(tmp_path):
    write_json(tmp_path / "report.json", {"precision": float("nan"), "others": [1.5, float("inf")]})
    assert json.loads((tmp_path / "report.json").read_text()) == {"precision": None, "others": [1.5, None]}


HOLD = """
import sys, time
from pathlib import Path
from apq_mmdet.engine.block_states import BlockStatesOnDisk
states = BlockStatesOnDisk(Path(sys.argv[1]), {"seed": 0}, False)
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_do_not_meet_in_a_work_dir(tmp_path):
    line = [sys.executable, "-W", "ignore", "-c", HOLD, str(tmp_path / "calibration")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(BadInputError, match=r"another run works in .*calibration"):
            BlockStatesOnDisk(tmp_path / "calibration", {"seed": 1}, False)
        other.kill()
    BlockStatesOnDisk(tmp_path / "calibration", {"seed": 1}, False)


def test_processes_of_torchrun_without_a_launcher_are_refused(config, tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert quantize(config, tmp_path) == 2
    assert "add --launcher pytorch" in capsys.readouterr().err
