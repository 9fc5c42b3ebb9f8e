"""The code in docs/library.md and README.md, run as it is printed."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import CHECKPOINT, ROOT, build_swin
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

from apq_mmdet.datasets import write_demo_set
from apq_mmdet.engine import quantize_detector, save_detector
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import safe_load
from apq_mmdet.layers import quantized_layers

register_all_modules()
LIBRARY, README = ROOT / "docs" / "library.md", ROOT / "README.md"
BLOCK = re.compile(r"(?:^`([\w.]+)`:\n\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHORT_RECIPE = f"""
_base_ = "{ROOT}/configs/_base_/recipes/apq_plus.py"
grid = (0.8, 1.0, 2)
quant = dict(
    search=dict(grids=dict(Linear=grid, Conv2d=grid, ConvTranspose2d=grid, MatMul=grid)),
    compensation=dict(ranges=2, rounding=False),
)
"""


class Block(NamedTuple):
    """A fenced block: the name of the file that it is (or ''), its language and its text."""

    file: str
    language: str
    code: str


def blocks(document: Path, *sections: str) -> list[Block]:
    """The fenced blocks of a document, or of some of its sections."""
    text = document.read_text()
    parts = [re.search(rf"^## {s}\n(.*?)^## ", text, re.MULTILINE | re.DOTALL)[1] for s in sections] or [text]
    return [Block(*found) for part in parts for found in BLOCK.findall(part)]


LIBRARY_BLOCKS = blocks(LIBRARY)
OWN_CONFIG, INHERITING, QUANTIZE, LOAD = blocks(README, "In your own config", "From Python")


class Reader:
    """Someone who follows a document: works in one folder, keeps what earlier blocks defined.

    Args:
        folder: the working directory, with ``configs`` and ``tools`` as in a checkout.
        replaced: what the words of a document stand for.

    Attributes:
        namespace: the Python names that are defined by now.
        after: the same after each block that was read.
    """

    def __init__(self, folder: Path, replaced: dict[str, Any]) -> None:
        self.folder, self.replaced = folder, replaced
        self.namespace: dict[str, Any] = {}
        self.after: list[dict[str, Any]] = []
        for name in ("configs", "tools"):
            (folder / name).symlink_to(ROOT / name)

    def read(self, document: list[Block], last: int) -> None:
        """Run the blocks up to number ``last`` that have not been run yet."""
        for block in document[len(self.after) : last + 1]:
            self.run(block)
            self.after.append(dict(self.namespace))

    def run(self, block: Block) -> None:
        """Write a file, or run Python or a command, in the reader's folder."""
        words = "|".join(self.replaced)
        code = re.sub(rf"(?<![/\w])({words})\b", lambda found: str(self.replaced[found[0]]), block.code)
        if block.file:
            (self.folder / block.file).write_text(code)
        elif block.language == "python":
            exec(compile(code, "block", "exec"), self.namespace)
        else:
            assert block.language == "bash"
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            command = ["bash", "-e", "-c", code]
            subprocess.run(command, env={**os.environ, "PATH": path}, check=True, timeout=300)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    data = tmp_path_factory.mktemp("drawn") / "data"
    write_demo_set(data, 0, 2, 2)
    recipe = folder / "short_apq_plus.py"
    recipe.write_text(SHORT_RECIPE)
    config = folder / "detector.py"
    config.write_text(
        f"_base_ = '{ROOT}/configs/demo/mask-rcnn_swin-demo.py'\n"
        f"train_dataloader = dict(dataset=dict(data_root='{data}/'))\n"
        "pipeline = [\n"
        "    dict(type='LoadImageFromFile'),\n"
        "    dict(type='Resize', scale=(112, 112), keep_ratio=True),\n"
        "    dict(type='LoadAnnotations', with_bbox=True, with_mask=True),\n"
        "    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),\n"
        "]\n"
        f"test_dataset = dict(data_root='{data}/', pipeline=pipeline)\n"
        "test_dataloader = dict(dataset=test_dataset, num_workers=0, persistent_workers=False)\n"
        f"test_evaluator = dict(ann_file='{data}/annotations/instances_val.json')\n"
    )
    (folder / "image.jpg").write_bytes((data / "val" / "000001.jpg").read_bytes())
    replaced = {
        "CONFIG": config,
        "CHECKPOINT": CHECKPOINT,
        "IMAGES": data / "train",
        "IMAGE": folder / "image.jpg",
        "DIR": folder / "out",
        "32": 1,
        "apq_plus": recipe,
    }
    before = Path.cwd()
    os.chdir(folder)
    yield Reader(folder, replaced)
    os.chdir(before)


@pytest.mark.parametrize("number", range(len(LIBRARY_BLOCKS)))
def test_library(reader, number):
    reader.read(LIBRARY_BLOCKS, number)


@pytest.fixture
def well_read(reader):
    """The reader at the end of docs/library.md, with nothing defined."""
    reader.read(LIBRARY_BLOCKS, len(LIBRARY_BLOCKS) - 1)
    reader.namespace = {}
    return reader


def after(reader, words):
    """What was defined after the first block that holds these words."""
    return reader.after[next(i for i, block in enumerate(LIBRARY_BLOCKS) if words in block.code)]


def bits_of(table):
    """(weight bits, input bits) of each layer with a weight; None is float."""
    rows = {(row.layer, row.role): row.bits for row in table}
    return {name: (rows[name, "weight"], rows[name, "input"]) for name, role in rows if role == "weight"}


def test_python_and_command_write_the_same_weights(well_read):
    out = well_read.folder / "out"
    ours, theirs = (safe_load(str(path / "quantized.pth"))["state_dict"] for path in (out, out / "from_folder"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_every_way_of_loading_gives_the_same_detections(well_read):
    in_memory = after(well_read, "save_detector(")["result"].pred_instances
    loaded = after(well_read, "DetInferencer(")
    assert len(in_memory) > 0
    for key in ("scores", "bboxes", "masks"):
        assert torch.equal(in_memory[key], loaded["result"].pred_instances[key])
    assert loaded["predictions"][0]["scores"] == in_memory.scores.tolist()
    metrics = after(well_read, "Runner.from_cfg")["metrics"]
    assert metrics["coco/bbox_mAP"] > 0
    files = sorted((well_read.folder / "out" / "eval").glob("*/*.json"))
    assert len(files) == 2  # of the Runner and of mmdet's tool
    for file in files:
        assert {key: json.loads(file.read_text())[key] for key in metrics} == metrics


def test_config_of_your_own(well_read):
    bits = bits_of(after(well_read, "render_table")["model"].quantization_table)
    assert bits.pop("backbone.patch_embed.projection") == (8, 8)
    layers = {name: pair for name, pair in bits.items() if name.startswith("backbone.")}
    assert {pair for name, pair in layers.items() if ".stages.3." in name} == {(None, None)}
    assert {pair for name, pair in layers.items() if ".stages.3." not in name} == {(4, 6)}


def test_single_layers_and_scope(well_read):
    single = bits_of(after(well_read, "gelu=dict(")["model"].quantization_table)
    assert single["backbone.patch_embed.projection"] == (4, None)
    assert single["backbone.stages.0.blocks.0.ffn.layers.1"] == (4, 8)
    assert single["backbone.stages.0.blocks.0.ffn.layers.0.0"] == (4, 4)
    whole = after(well_read, 'scope="detector"')["model"]
    assert any(name.startswith("rpn_head.") for name, _ in quantized_layers(whole))


def test_readme_configs(well_read):
    well_read.run(OWN_CONFIG._replace(file="own.py"))
    inherits = '_base_ = "./own.py"\n'  # as the text before it says
    well_read.run(INHERITING._replace(file="inheriting.py", code=inherits + INHERITING.code))
    own, inheriting = (MODELS.build(Config.fromfile(f"{name}.py").model) for name in ("own", "inheriting"))
    assert bits_of(own.quantization_table)["backbone.stages.3.blocks.1.attn.w_msa.qkv"] == (8, 8)
    bits = bits_of(inheriting.quantization_table)
    assert bits["backbone.stages.3.blocks.1.attn.w_msa.qkv"] == (4, 6)
    assert bits["roi_head.bbox_head.fc_cls"] == (8, 8)
    assert bits["backbone.patch_embed.projection"] == (None, None)
    assert bits["roi_head.mask_head.upsample"] == (4, 6)


def test_readme_python(well_read):
    """It writes what the library's document does, with the same images and recipe."""
    saved = well_read.folder / "out" / "quantized.pth"
    before = safe_load(str(saved))["state_dict"]
    saved.write_bytes(b"")
    well_read.run(QUANTIZE)
    after = safe_load(str(saved))["state_dict"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    well_read.run(LOAD)
    assert len(well_read.namespace["result"].pred_instances) > 0


def test_classification_python(well_read):
    (code,) = blocks(ROOT / "docs" / "classification.md", "From Python")
    well_read.namespace = dict(images=[torch.randn(1, 3, 224, 224)])
    well_read.run(code)
    assert well_read.namespace["state"]["blocks.0.attn.qkv.weight_codes"].dtype == torch.uint8
    assert any(row.layer == "blocks.0.attn.query_key" and row.bits == 4 for row in well_read.namespace["table"])


def test_no_fenced_block_is_left_out():
    assert LIBRARY.read_text().count("```") == 2 * len(LIBRARY_BLOCKS)
    assert README.read_text().count("```") == 2 * len((OWN_CONFIG, INHERITING, QUANTIZE, LOAD))


def test_refusals():
    model = build_swin()
    with pytest.raises(BadInputError, match="has no 'cfg': take a model of"):
        quantize_detector(model, [torch.randn(1, 3, 41, 50)])
    with pytest.raises(BadInputError, match="is a float model: quantize it first"):
        save_detector(model, "nowhere")
    model.cfg = Config()
    for images, message in (([], "no calibration images"), (["x.jpg"], "packed samples .* the first one is a str")):
        with pytest.raises(BadInputError, match=message):
            quantize_detector(model, images)
    model.quantization_table = []
    with pytest.raises(BadInputError, match="is quantized already; start from a float config"):
        quantize_detector(model, [torch.randn(1, 3, 41, 50)])
