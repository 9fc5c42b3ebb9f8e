"""The start of the demo cascade: weights of the Mask R-CNN, spread over three stages."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_demo", ROOT / "tools/train_demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(name: str) -> torch.nn.Module:
    register_all_modules()
    return MODELS.build(Config.fromfile(ROOT / f"configs/demo/{name}.py").model)


def test_regression_becomes_class_agnostic_and_finer_by_stage(tool: ModuleType) -> None:
    per_class = torch.arange(8.0)[:, None]  # two classes x four coordinates, one input
    start = tool.to_cascade({"roi_head.bbox_head.fc_reg.weight": per_class})
    mean = torch.tensor([[2.0], [3.0], [4.0], [5.0]])
    for stage in range(3):
        assert torch.equal(start[f"roi_head.bbox_head.{stage}.fc_reg.weight"], mean * (stage + 1))


def test_every_weight_of_the_cascade_is_initialised(tool: ModuleType) -> None:
    single, cascade = build("mask-rcnn_swin-demo"), build("cascade-mask-rcnn_swin-demo")
    cascade.load_state_dict(tool.to_cascade(single.state_dict()), strict=True)


@pytest.mark.parametrize("name", ["mask-rcnn_swin-demo", "cascade-mask-rcnn_swin-demo"])
def test_committed_checkpoint_loads_strictly_and_safely(name: str) -> None:
    checkpoint = torch.load(ROOT / f"demo/{name}.pth", map_location="cpu", weights_only=True)
    build(name).load_state_dict(checkpoint["state_dict"], strict=True)
    assert len(checkpoint["meta"]["dataset_meta"]["classes"]) == 8
