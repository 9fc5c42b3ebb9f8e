"""The demo detector as a detector of COCO: its index, and what the checks would say of it on COCO itself."""

import hashlib
from pathlib import Path

import yaml
from helpers import CHECKPOINT, ROOT

from apq_mmdet.reproduction.checkpoints import Checkpoint
from apq_mmdet.reproduction.data import TRAIN, VAL, Data
from apq_mmdet.reproduction.prepare import Examined
from apq_mmdet.reproduction.rows import Selection

NAME = "mask-rcnn_swin-t-p4-w7_fpn_drawn-3x_coco"
FILE = f"demo-{hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest()[:8]}.pth"
ADDRESS = f"https://example.org/weights/{FILE}"
TASKS = {"Object Detection": {"box AP": 46.0}, "Instance Segmentation": {"mask AP": 41.7}}


def write_index(folder: Path, detector: Path, recipes=(("apq", 8), ("apq", 4))) -> Path:
    """An index of a float detector with the demo weights, and its quantized versions."""
    results = [{"Task": task, "Dataset": "COCO", "Metrics": metrics} for task, metrics in TASKS.items()]
    models = [{"Name": NAME, "Config": str(detector), "Results": results, "Weights": ADDRESS}]
    for recipe, bits in recipes:
        config = f"{recipe}-w{bits}a{bits}.py"
        (folder / f"{recipe}.py").write_text(
            f"_base_ = ['{detector}', '{ROOT}/configs/_base_/recipes/{recipe}.py']\n"
            "model = dict(type='apq_mmdet.MaskRCNN', quant={{_base_.quant}})\n"
        )
        (folder / config).write_text(
            f"_base_ = './{recipe}.py'\nmodel = dict(quant=dict(w_bits={bits}, a_bits={bits}))\n"
        )
        metadata = {"Weight bits": bits, "Activation bits": bits, "Scope": "backbone", "Recipe": recipe}
        name = f"{NAME}_{recipe}-w{bits}a{bits}"
        models.append({"Name": name, "Config": config, "Metadata": {**metadata, "Float model": NAME}})
    (folder / "metafile.yml").write_text(yaml.safe_dump({"Models": models}))
    index = folder / "model-index.yml"
    index.write_text("Import:\n  - metafile.yml\n")
    return index


def examined_coco(selection: Selection, root: str = "coco") -> Examined:
    """What ``examine`` would say of a selection, if the data were COCO."""
    items = [*selection.detectors, *selection.rows]
    return Examined(
        data=Data(root, {TRAIN: 118_287, VAL: 5_000}, {TRAIN: "a" * 64, VAL: "b" * 64}),
        sample="val.jpg",
        checkpoints={d.name: Checkpoint(Path(FILE), "c" * 64, verified=True) for d in selection.detectors},
        images={row.name: [(n, f"train2017/{n}.jpg") for n in range(row.num_calib)] for row in selection.rows},
        conditions={item.name: {"version": "1", "item": item.name} for item in items},
    )
