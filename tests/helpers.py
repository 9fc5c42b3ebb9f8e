"""Small models and recipes that the tests share."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from mmdet.models.backbones import SwinTransformer
from torch import distributed, nn
from torch.multiprocessing import start_processes

from apq_mmdet import models  # noqa: F401  (registers mmdet's layers)
from apq_mmdet.calibration import Recipe
from apq_mmdet.calibration.store import TensorStore
from apq_mmdet.calibration.units import UnitCall, UnitCalls
from apq_mmdet.engine.quantized_config import load_recipe
from apq_mmdet.layers import quantized_layers, quantizers_of
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = ROOT / "demo" / "mask-rcnn_swin-demo.pth"


def build_swin(depth: int = 2, stages: int = 1) -> SwinTransformer:
    """A Swin of 8 channels with random weights and biases, in eval mode."""
    swin = SwinTransformer(
        embed_dims=8,
        depths=(depth,) * stages,
        num_heads=(2, 4)[:stages],
        strides=(4, 2)[:stages],
        out_indices=tuple(range(stages)),
        drop_path_rate=0.0,
    )
    for parameter in swin.parameters():
        nn.init.normal_(parameter, std=0.4)
    swin.eval()  # mmdet's own train() returns None
    return swin


def recipe(name: str = "apq", **settings) -> Recipe:
    """A shipped recipe at 4 bits with top-level settings changed; ``search`` is merged, not replaced."""
    quant = load_recipe(name)
    search = {**quant.get("search", {}), **settings.pop("search", {})}
    quant = {**quant, "w_bits": 4, "a_bits": 4, **settings}
    if search:
        quant["search"] = search
    return Recipe.from_dict(quant)


def short_grids(number: int = 8) -> dict:
    """Fewer candidates for tests."""
    grid = (0.5, 1.1, number)
    return {"Linear": grid, "Conv2d": grid, "ConvTranspose2d": grid, "MatMul": (0.9, 1.2, number)}


@contextmanager
def process_group(rank: int, processes: int, port: int) -> Iterator[None]:
    """One of several processes that talk through gloo, whose threads can abort a process that exits before them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    distributed.init_process_group("gloo", rank=rank, world_size=processes)
    yield
    distributed.destroy_process_group()


def in_processes(work: Callable[..., None], processes: int, *args: object) -> None:
    """Run ``work(rank, processes, *args)`` in so many processes at once; an exception in one is raised here.

    They are forked from a process that has imported everything, once for all tests, and has done nothing else.
    """
    multiprocessing.set_forkserver_preload(["apq_mmdet.models"])
    start_processes(work, (processes, *args), nprocs=processes, start_method="forkserver")


def observed(block: nn.Module, inputs: list[tuple]) -> list:
    """Give the quantizers of a block min-max ranges from these inputs; the block's float outputs."""
    with torch.no_grad(), quantizer_mode(quantizers_of(block), QuantizerMode.OBSERVE):
        outputs = [block(*args) for args in inputs]
    for _, layer in quantized_layers(block):
        if "weight" in layer.quantizers:
            layer.quantizers["weight"].observe(layer.weight)
    for quantizer in quantizers_of(block):
        quantizer.set_range_factor(1.0)
    return outputs


def as_calls(entries: list[UnitCall]) -> UnitCalls:
    """What a block was called with, in memory."""
    calls = UnitCalls(TensorStore(memory=2**30), "block")
    for entry in entries:
        calls.add(entry)
    return calls
