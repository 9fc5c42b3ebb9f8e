"""Train a demo detector on the drawn demo set: ``python tools/train_demo.py mask-rcnn`` (then ``cascade``).

A checkpoint is written every epoch; ``--resume`` goes on from the latest. The final (averaged) weights are
exported to ``demo/``, without optimizer, in a form that loads with ``torch.load(weights_only=True)``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner

CONFIGS = {
    "mask-rcnn": "configs/demo/mask-rcnn_swin-demo.py",
    "cascade": "configs/demo/cascade-mask-rcnn_swin-demo.py",
}
ROOT = Path(__file__).resolve().parents[1]
STAGES = 3


def parse_args() -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("detector", choices=CONFIGS)
    parser.add_argument("--work-dir", type=Path, help="default: work_dirs/NAME_OF_CONFIG")
    parser.add_argument("--init", type=Path, help="weights to start from (cascade: demo/mask-rcnn_swin-demo.pth)")
    parser.add_argument("--out", type=Path, help="exported checkpoint (default: demo/NAME_OF_CONFIG.pth)")
    parser.add_argument("--resume", action="store_true", help="go on from the latest checkpoint in the work dir")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, help="config overrides, key=value")
    return parser.parse_args()


def main() -> None:
    """Train, then export."""
    args = parse_args()
    name = Path(CONFIGS[args.detector]).stem
    cfg = Config.fromfile(ROOT / CONFIGS[args.detector])
    cfg.work_dir = str(args.work_dir or ROOT / "work_dirs" / name)
    cfg.resume = args.resume
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    init = args.init or (ROOT / "demo/mask-rcnn_swin-demo.pth" if args.detector == "cascade" else None)
    if init and not args.resume:
        cfg.load_from = str(_initial_weights(init, cascade=args.detector == "cascade", folder=Path(cfg.work_dir)))
    # The runner's own checkpoints keep the log's history, which torch must be told is harmless.
    arrays = [np.ndarray, np.dtype, np._core.multiarray._reconstruct, np._core.multiarray.scalar]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    torch.serialization.add_safe_globals([HistoryBuffer, *arrays, *dtypes, getattr])
    runner = Runner.from_cfg(cfg)
    runner.train()
    export(Path(runner.work_dir) / f"epoch_{runner.max_epochs}.pth", args.out or ROOT / "demo" / f"{name}.pth")


def _initial_weights(path: Path, cascade: bool, folder: Path) -> Path:
    """File with the weights to start from; for a cascade, every stage gets a copy of the single heads."""
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": to_cascade(weights) if cascade else weights}, folder / "init.pth")
    return folder / "init.pth"


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
        for stage in range(STAGES):
            regression = ".fc_reg." in key
            copy = value.unflatten(0, (-1, 4)).mean(0) * (stage + 1) if regression else value
            result[key.replace(f"{head}.", f"{head}.{stage}.")] = copy.clone()
    return result


def export(checkpoint: Path, out: Path) -> None:
    """Keep the weights and what ``init_detector`` needs, as plain Python types."""
    content: dict[str, Any] = torch.load(checkpoint, map_location="cpu", weights_only=True)
    meta = content["meta"]["dataset_meta"]
    meta = {"classes": tuple(meta["classes"]), "palette": [tuple(c) for c in meta.get("palette", [])]}
    weights = {key: value.contiguous().clone() for key, value in content["state_dict"].items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"meta": {"dataset_meta": meta}, "state_dict": weights}, out)
    print(f"{out}: {sum(v.numel() for v in weights.values()) / 1e6:.2f} M values")


if __name__ == "__main__":
    main()
