"""Fixtures of all tests."""

import os
import socket

# one thread in this process and in those it starts: results are compared bit by bit, and threads of several
# processes would fight for the cores
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch
from helpers import build_swin
from mmdet.models.backbones import SwinTransformer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def swin() -> SwinTransformer:
    return build_swin()


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
