"""Train a demo detector on the drawn demo set: ``python tools/train_demo.py mask-rcnn``, then ``cascade``.

A detector is trained in stages, one config each; a stage starts from the averaged weights of the one before it. A
checkpoint is written every epoch: ``--resume`` skips finished stages and goes on from the latest checkpoint. The
last stage's weights are exported in half precision, without optimizer, and load with ``weights_only=True``.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from apq_mmdet.datasets.demo import STAMP
from apq_mmdet.files import known_globals, safe_load, tensor_bytes, write_atomic

ROOT = Path(__file__).resolve().parents[1]
STAGES = {
    "mask-rcnn": ("mask-rcnn_swin-demo_small", "mask-rcnn_swin-demo"),
    "cascade": ("cascade-mask-rcnn_swin-demo",),
}
CASCADE_STAGES = 3


def parse_args() -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", choices=STAGES)
    parser.add_argument(
        "--work-dir", type=Path, default=ROOT / "work_dirs", help="gets a folder for each stage (default: work_dirs)"
    )
    parser.add_argument(
        "--init",
        type=Path,
        default=ROOT / "demo/mask-rcnn_swin-demo.pth",
        help="Mask R-CNN that the cascade starts from (default: demo/mask-rcnn_swin-demo.pth)",
    )
    parser.add_argument("--out", type=Path, help="exported checkpoint (default: demo/NAME_OF_CONFIG.pth)")
    parser.add_argument("--resume", action="store_true", help="go on after an interruption")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="config overrides, key=value")
    return parser.parse_args()


def main() -> None:
    """Train stage after stage, then export."""
    args = parse_args()
    if not (ROOT / "data/demo" / STAMP).is_file():
        sys.exit("data/demo holds no demo set: draw it with python tools/make_demo_data.py")
    before: Path | None = None
    for name in STAGES[args.detector]:
        folder = args.work_dir / name
        if args.detector == "cascade":
            before = folder / "init.pth"
            weights = to_cascade(safe_load(args.init)["state_dict"])
            write_atomic(before, tensor_bytes({"state_dict": weights}))
        final = folder / "final.pth"
        if not (args.resume and final.exists()):
            train(name, folder, before, args.resume, args.cfg_options or {}, final)
        before = final
    out = args.out or ROOT / "demo" / final.parent.with_suffix(".pth").name
    write_atomic(out, tensor_bytes(halved(safe_load(final))))
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB")


def train(name: str, folder: Path, init: Path | None, resume: bool, options: dict[str, Any], final: Path) -> None:
    """Run one stage and write its averaged weights to `final`."""
    cfg = Config.fromfile(ROOT / f"configs/demo/{name}.py")
    cfg.work_dir = str(folder)
    cfg.resume = resume and (folder / "last_checkpoint").exists()
    cfg.load_from = str(init) if init and not cfg.resume else None
    cfg.merge_from_dict(options)
    with known_globals():  # the runner's own checkpoints keep the log's history
        runner = Runner.from_cfg(cfg)
        runner.train()
    write_atomic(final, tensor_bytes(publishable(folder / f"epoch_{runner.max_epochs}.pth")))


def to_cascade(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights of a Mask R-CNN as the start of a three-stage cascade.

    The cascade's box regression is shared by the classes: it starts from the mean over classes. Later stages
    express boxes in finer units (a half, then a third), so their regression starts that much larger.
    """
    result: dict[str, torch.Tensor] = {}
    for key, value in weights.items():
        head = next((h for h in ("bbox_head", "mask_head") if key.startswith(f"roi_head.{h}.")), None)
        if head is None:
            result[key] = value
            continue
        for stage in range(CASCADE_STAGES):
            regression = ".fc_reg." in key
            copy = value.unflatten(0, (-1, 4)).mean(0) * (stage + 1) if regression else value
            result[key.replace(f"{head}.", f"{head}.{stage}.")] = copy.clone()
    return result


def publishable(checkpoint: Path) -> dict[str, Any]:
    """Only the weights and what ``init_detector`` needs, as plain Python types."""
    content = safe_load(checkpoint)
    meta = {"classes": tuple(content["meta"]["dataset_meta"]["classes"])}
    weights = {key: value.contiguous().clone() for key, value in content["state_dict"].items()}
    return {"meta": {"dataset_meta": meta}, "state_dict": weights}


def halved(content: dict[str, Any]) -> dict[str, Any]:
    """The same in half precision, so that the file is small; a model widens the values when it loads them."""
    weights = content["state_dict"]
    return {**content, "state_dict": {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}}


if __name__ == "__main__":
    main()
