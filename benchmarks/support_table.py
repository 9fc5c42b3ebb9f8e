"""Which of mmdet's detectors with a Swin backbone can be quantized, and how far: runs each type, and writes a table.

One config of each type is built with few channels, layers and queries and with weights from a seed, quantized with
``minmax`` at 4 bits through the command, and evaluated on a drawn data set of a few images. The AP means nothing;
that it runs, what is quantized, and what is not and why, does.

    python benchmarks/support_table.py            # prints the table
    python benchmarks/support_table.py --write    # writes docs/support.md
"""

import argparse
import contextlib
import copy
import io
import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import mmdet
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import nn

from apq_mmdet.datasets import CLASSES, write_demo_set
from apq_mmdet.datasets.calibration import test_pipeline
from apq_mmdet.engine import command
from apq_mmdet.files import write_atomic

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "support.md"
CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"
SCOPES = ("backbone", "detector")
IMAGE = 64  # pixels of a side
CHANNELS = 32  # of necks and heads
BUILT_IN = 256  # channels of transformer detectors: mmdet's code for their queries knows no other number
EMBED_DIMS = 8  # of the backbone's first stage

INTRODUCTION = """\
# Detectors

Written by `python benchmarks/support_table.py --write`, checked by `tests/test_models/test_support.py`; do not edit.

One config of each type of detector that mmdet ships with a Swin backbone, as it runs through `tools/quantize_det.py`
in each scope. They were run at reduced size (one block a stage, few channels, two encoder and decoder layers, few
queries), with random weights, `minmax` at 4 bits and drawn images, and evaluated after that where the annotations are
COCO's boxes and masks. So the table says what runs and what is quantized, not how accurate it is.

In scope `detector` calibration compares what the heads predict before any post-processing. Where a transformer picks
its queries among the encoder's proposals, the quantized model takes those that the float model picked, so that query i
means the same in both; the evaluation afterwards lets it pick its own. The scope knows RPN with standard and cascade
RoI heads (box heads of any kind but SABL's and those with Seesaw loss; no semantic head beside them), the dense heads
of RetinaNet, ATSS and RTMDet and plain anchor heads, the heads of Deformable DETR, DINO and DDQ, and those of
MaskFormer and Mask2Former. Subclasses of these, which may predict other things, and all others are refused;
scope `backbone` takes any detector of mmdet that has a backbone (semi-supervised ones hold detectors instead).
"""


@dataclass(frozen=True)
class Outcome:
    """What became of one detector in one scope.

    Attributes:
        code: the command's exit code.
        message: why it was refused or has failed; else empty.
        layers: rows of the layer table as the report holds them; empty where there is none.
        metrics: of the quantized detector; empty where nothing was measured.
    """

    code: int
    message: str
    layers: list[dict[str, Any]]
    metrics: dict[str, float]


@dataclass(frozen=True)
class Row:
    """One type of detector: its name, the config that was run, and what became of it by scope."""

    detector: str
    config: str
    outcomes: dict[str, Outcome]


def families() -> dict[str, Path]:
    """The first config of each type of detector that mmdet ships with Swin; panoptic ones are types of their own."""
    found: dict[str, Path] = {}
    for path in sorted(CONFIGS.glob("*/*.py")):
        if "swin" not in path.read_text().lower():
            continue
        model = Config.fromfile(path).model
        if model.backbone.type == "SwinTransformer":
            panoptic = (model.get("test_cfg") or {}).get("panoptic_on", False)
            found.setdefault(model.type + " (panoptic)" * panoptic, path)
    return found


def small_values(channels: int) -> dict[str, Any]:
    """What makes a model small: values of keys, wherever they stand in its config."""
    return dict(
        **dict.fromkeys(("out_channels", "feat_channels", "conv_out_channels", "embed_dims"), channels),
        **dict.fromkeys(("feedforward_channels", "fc_out_channels"), CHANNELS),
        **dict.fromkeys(("num_classes", "num_things_classes"), len(CLASSES)),
        **dict.fromkeys(("max_per_img", "max_per_image"), 10),
        class_weight=[1.0] * len(CLASSES) + [0.1],
        num_stuff_classes=0,
        num_feats=channels // 2,
        num_groups=4,
        num_queries=12,
        num_layers=2,
        num_cp=0,  # layers whose activations are computed anew in training
        num_blocks=1,
        init_cfg=None,
        train_cfg=None,
    )


def small_config(path: Path, data: Path) -> Config:
    """A config at reduced size on the drawn data set in ``data``."""
    cfg = Config.fromfile(path)
    backbone = cfg.model.backbone
    channels = BUILT_IN if "encoder" in cfg.model else CHANNELS
    model = _replaced(cfg.model.to_dict(), small_values(channels))
    stages = len(backbone.depths)
    model["backbone"].update(depths=[1] * stages, num_heads=[2] * stages, embed_dims=EMBED_DIMS, window_size=4)
    _set_inputs(model, [EMBED_DIMS * 2**i for i in backbone.out_indices], channels)
    pipeline = _replaced(test_pipeline(cfg), dict(scale=(IMAGE, IMAGE), size=(IMAGE, IMAGE)))

    def loader(split: str) -> dict[str, Any]:
        dataset = dict(type="CocoDataset", metainfo=dict(classes=CLASSES), data_root=f"{data}/", pipeline=pipeline)
        dataset.update(ann_file=f"annotations/instances_{split}.json", data_prefix=dict(img=f"{split}/"))
        sampler = dict(type="DefaultSampler", shuffle=False)
        return dict(batch_size=1, num_workers=0, sampler=sampler, dataset=dict(dataset, test_mode=split == "val"))

    small = dict(
        default_scope="mmdet",
        model=model,
        train_dataloader=loader("train"),
        train_cfg=dict(by_epoch=True, max_epochs=1),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
        test_dataloader=loader("val"),
        test_evaluator=cfg.test_evaluator,
        test_cfg=dict(type="TestLoop"),
        log_level="ERROR",
    )
    return Config(_replaced(small, dict(ann_file=f"{data}/annotations/instances_val.json"), inside="test_evaluator"))


def _replaced(part: Any, values: dict[str, Any], inside: str | None = None) -> Any:
    """Other values of these keys, wherever they stand, or wherever they stand below the key ``inside``."""
    if isinstance(part, list | tuple):
        return type(part)(_replaced(child, values, inside) for child in part)
    if not isinstance(part, dict):
        return part
    here = values if inside is None else {}
    return {
        key: here[key] if key in here else _replaced(value, values, None if key == inside else inside)
        for key, value in part.items()
    }


def _set_inputs(part: Any, backbone: list[int], channels: int) -> None:
    """Fit ``in_channels`` to smaller parts, in place: lists take the backbone's, numbers the neck's."""
    for child in part.values() if isinstance(part, dict) else part:
        if isinstance(child, dict | list | tuple):
            _set_inputs(child, backbone, channels)
    if isinstance(part, dict) and "in_channels" in part:
        several = isinstance(part["in_channels"], list | tuple)
        part["in_channels"] = list(backbone) if several else channels


def seeded_detector(cfg: Config) -> nn.Module:
    """The float detector with weights from a seed."""
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model))  # some detectors change their config
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def write_checkpoint(cfg: Config, path: Path) -> None:
    """Its float weights; none where mmdet cannot build it, of which the command then says why."""
    state = {}
    with contextlib.suppress(Exception):
        state = seeded_detector(cfg).state_dict()
    torch.save({"state_dict": state}, path)


def is_evaluated(cfg: Config) -> bool:
    """Whether the config measures boxes and masks and nothing else."""
    return isinstance(cfg.test_evaluator, dict) and cfg.test_evaluator.type == "CocoMetric"


def run(cfg: Config, scope: str, folder: Path, *options: str) -> Outcome:
    """Quantize through the command, with ``minmax`` at 4 bits unless options say otherwise."""
    folder.mkdir(parents=True)
    args = [folder / "float.py", folder / "float.pth", "--work-dir", folder, "--scope", scope, "--recipe", "minmax"]
    args += ["--w-bits", 4, "--a-bits", 4, "--num-calib", 2, "--device", "cpu", *options]
    errors = io.StringIO()
    with contextlib.ExitStack() as stack:
        # the layout of the configs that are written takes half of the time
        stack.enter_context(mock.patch("mmengine.config.config.FormatCode", lambda text, **_: (text, True)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(errors))
        cfg.dump(folder / "float.py")
        write_checkpoint(cfg, folder / "float.pth")
        code = command.main([str(arg) for arg in args])
    if code:
        lines = [line for line in errors.getvalue().splitlines() if line.startswith(("error: ", "failed: "))]
        return Outcome(code, lines[-1].split(": ", 1)[1], [], {})
    report = json.loads((folder / "report.json").read_text())
    return Outcome(code, "", report["layers"], report["metrics"]["quantized"] or {})


def run_all(folder: Path) -> Iterator[Row]:
    """Every type of detector; one that is refused in the smaller scope is not tried in the larger one."""
    register_all_modules()
    data = folder / "data"
    write_demo_set(data, 0, 2, 1)
    for number, (detector, path) in enumerate(families().items()):
        outcomes: dict[str, Outcome] = {}
        for scope in SCOPES:
            cfg = small_config(path, data)
            outcomes[scope] = run(cfg, scope, folder / f"{number}-{scope}", *[] if is_evaluated(cfg) else ["--no-eval"])
            if outcomes[scope].code:
                break
        yield Row(detector, str(path.relative_to(CONFIGS)), outcomes)


def render(rows: Iterable[Row]) -> str:
    """The document."""
    rows = sorted(rows, key=lambda row: row.detector)
    ran = [row for row in rows if not any(outcome.code for outcome in row.outcomes.values())]
    refused = [(row, outcome) for row in rows for outcome in row.outcomes.values() if outcome.code]
    reasons = sorted({_float(r) for row in ran for r in row.outcomes["detector"].layers if not r["bits"]})
    return "\n".join(
        [
            INTRODUCTION,
            *_table(
                ("detector", "config", "evaluated", *(f"quantized in scope `{scope}`" for scope in SCOPES)),
                [
                    (
                        row.detector,
                        f"`{row.config}`",
                        "yes" if row.outcomes["detector"].metrics else "no",
                        *(_quantized(row.outcomes[scope].layers) for scope in SCOPES),
                    )
                    for row in ran
                ],
            ),
            "\n## What stays float in scope `detector`\n",
            *_table(
                ("layer", "why", "in"),
                [
                    (f"`{kind}`", reason, ", ".join(row.detector for row in ran if (kind, reason) in _floats(row)))
                    for kind, reason in reasons
                ],
            ),
            "\n## Refused\n",
            *_table(
                ("detector", "config", "message"),
                [(row.detector, f"`{row.config}`", outcome.message) for row, outcome in refused],
            ),
            "",
        ]
    )


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in [header, ("---",) * len(header), *rows]]


def _quantized(layers: list[dict[str, Any]]) -> str:
    """How many layers of which kinds, the most frequent first."""
    kinds = Counter(kind for _, kind in {(r["layer"], r["kind"]) for r in layers if r["bits"]})
    return ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items(), key=lambda item: (-item[1], item[0])))


def _float(row: dict[str, Any]) -> tuple[str, str]:
    return row["kind"], row["reason"]


def _floats(row: Row) -> set[tuple[str, str]]:
    return {_float(r) for r in row.outcomes["detector"].layers if not r["bits"]}


def main() -> None:
    """Print or write the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write {DOCUMENT.name}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        text = render(run_all(Path(folder)))
    if args.write:
        write_atomic(DOCUMENT, text.encode())
    else:
        print(text)


if __name__ == "__main__":
    main()
