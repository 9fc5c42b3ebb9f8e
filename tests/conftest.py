"""Fixtures of all tests."""

import pytest
import torch
from helpers import build_swin
from mmdet.models.backbones import SwinTransformer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def swin() -> SwinTransformer:
    return build_swin()
