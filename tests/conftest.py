"""Fixtures of all tests."""

import os
import socket
from collections.abc import Iterator
from unittest.mock import patch

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


@pytest.fixture(scope="session", autouse=True)
def _configs_as_they_come() -> Iterator[None]:
    """Formatting a config with yapf, which every Runner does three times, takes longer than most of what is tested.

    Commands that run as processes of their own format theirs.
    """
    with patch("mmengine.config.config.FormatCode", lambda text, **_: (text, True)):
        yield


@pytest.fixture
def swin() -> SwinTransformer:
    return build_swin()


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
