"""AP of finished runs on more val images than the demo set has: finer than that on its 400.

    python benchmarks/more_images.py CONFIG CHECKPOINT RUN [RUN ...] --out benchmarks/results/more_images.json

CONFIG and CHECKPOINT are the float detector's, each RUN is a work dir of tools/quantize_det.py (those of
benchmarks/accuracy.py are in work_dirs/accuracy). The images are drawn as those of the demo set are, from another
seed, so that no detector was trained, calibrated or compared on any of them before. Results are kept as they come,
and those of a checkpoint that has not changed are not made again.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_error import parse_runs
from mmengine.config import Config
from mmengine.runner import Runner

from apq_mmdet.datasets import write_demo_set
from apq_mmdet.files import write_json

FLOAT = "float"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--num-val", type=int, default=1600, help="images to evaluate (default: 1600)")
    add("--seed", type=int, default=1, help="of the images; the demo set has 0 (default: 1)")
    add("--data", type=Path, default=Path("work_dirs/more_images"), help="folder for the images and logs")
    return parse_runs(parser, argv, FLOAT)


def evaluate(config: str, checkpoint: str, data: Path, work_dir: Path) -> list[float]:
    """Box and mask AP of a detector on the val images of a demo set, in percent."""
    cfg = Config.fromfile(config)
    cfg.load_from, cfg.work_dir = checkpoint, str(work_dir)
    cfg.test_dataloader.dataset.data_root = f"{data}/"
    cfg.test_evaluator.ann_file = str(data / "annotations" / "instances_val.json")
    metrics = Runner.from_cfg(cfg).test()
    # mmdet gives none of a run without a single detection
    return [round(100 * metrics.get(f"coco/{kind}_mAP", 0.0), 1) for kind in ("bbox", "segm")]


def read_results(out: Path, images: dict[str, int]) -> dict[str, Any]:
    """What earlier commands found on these images."""
    found = json.loads(out.read_text()) if out.exists() else {"images": images, "detectors": {}}
    if found["images"] != images:
        raise SystemExit(f"{out} holds results on other images ({found['images']}): choose another --out")
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate what has no result yet."""
    args = parse_args(argv)
    results = read_results(args.out, {"seed": args.seed, "number": args.num_val})
    data = args.data.resolve() / "demo"
    write_demo_set(data, args.seed, 1, args.num_val)
    todo = {FLOAT: (args.config, args.checkpoint)}
    todo |= {run.resolve().name: (str(run / "config.py"), str(run / "quantized.pth")) for run in args.runs}
    for name, (config, checkpoint) in todo.items():
        digest = hashlib.sha256(Path(checkpoint).read_bytes()).hexdigest()
        found = results["detectors"].get(name)
        if found is None or found["sha256"] != digest:
            ap = evaluate(config, checkpoint, data, args.data / "logs")
            found = results["detectors"][name] = {"box_and_mask_ap": ap, "sha256": digest}
            write_json(args.out, results)
        print(name, *found["box_and_mask_ap"], flush=True)


if __name__ == "__main__":
    main()
