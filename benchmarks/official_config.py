"""mmdet's official Mask R-CNN Swin-T config at its own resolution: quantize, save, load, evaluate, compare bits.

No trained COCO weights are needed: the weights are drawn from a seed, so the AP means nothing, but time, memory, file
sizes and the identity of raw outputs before saving and after loading do.

    python benchmarks/official_config.py --data-root COCO [--out benchmarks/results/official_config.json]
"""

import argparse
import json
import multiprocessing
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from mmdet.apis import init_detector
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner

from apq_mmdet.calibration.blocks import tensors_of
from apq_mmdet.datasets.calibration import calibration_from_folder
from apq_mmdet.engine import command
from apq_mmdet.models import detection_task

CONFIG = "mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py"
RUNS = [dict(recipe="minmax", num_calib=4), dict(recipe="apq_fast", num_calib=1)]


def parse_args() -> argparse.Namespace:
    """Command line of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data-root", type=Path, required=True, help="folder in COCO layout: annotations, train2017, val2017"
    )
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/official_config"))
    parser.add_argument("--num-val", type=int, default=4, help="val images to evaluate")
    parser.add_argument("--scope", default="backbone")
    gain = "factor of the weights of queries and keys, which as drawn attend to all alike (default: 1)"
    parser.add_argument("--query-key-gain", type=float, default=1.0, metavar="G", help=gain)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/official_config.json"))
    return parser.parse_args()


def seeded_checkpoint(path: Path, gain: float) -> None:
    """The config's detector with weights from seed 0, those of queries and keys times ``gain``."""
    cfg = Config.fromfile(path.with_name("float.py"))
    register_all_modules()
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    for name, module in model.backbone.named_modules():
        if name.endswith("attn.w_msa.qkv"):
            module.weight.data[: module.out_features // 3 * 2] *= gain
    torch.save({"meta": {}, "state_dict": model.state_dict()}, path)


def raw_outputs(model: torch.nn.Module, image: Any) -> list[torch.Tensor]:
    """RPN, box and mask head outputs of one sample, on the model's own proposals."""
    model.eval()
    with torch.no_grad():
        outputs, _ = detection_task(model).teacher(model, image)
    return [t.clone() for t in tensors_of(outputs)]


def run_one(run: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Quantize with one recipe; runs in a process of its own, so that peak memory is that of this run."""
    out = args.work_dir / run["recipe"]
    base = args.work_dir
    options = [str(base / "float.py"), str(base / "float.pth"), "--work-dir", str(out), "--recipe", run["recipe"]]
    options += ["--w-bits", "4", "--a-bits", "4", "--num-calib", str(run["num_calib"]), "--scope", args.scope]
    parsed = command.build_parser().parse_args([*options, "--device", "cpu"])
    command.choose_device(parsed.device)
    start = time.perf_counter()
    runner = Runner.from_cfg(command.build_config(parsed))
    runner.test()
    seconds = time.perf_counter() - start
    images = calibration_from_folder(runner.cfg, str(args.data_root / "val2017"), 1, seed=1)
    before = raw_outputs(runner.model, images[0])
    loaded = init_detector(str(out / "config.py"), str(out / "quantized.pth"), device="cpu")
    after = raw_outputs(loaded, images[0])
    identical = len(before) == len(after) and all(map(torch.equal, before, after))
    report = json.loads((out / "report.json").read_text())
    return {
        **run,
        "scope": args.scope,
        "evaluated_images": args.num_val,
        "raw_outputs": len(before),
        "raw_outputs_bit_identical_after_loading": identical,
        "calibration_seconds": round(report["calibration_seconds"], 1),
        "total_seconds": round(seconds, 1),
        "peak_memory_gib": round(report["peak_memory"]["host_bytes"] / 2**30, 2),
        "sizes": report["sizes"],
        "threads": torch.get_num_threads(),
        "slowest_blocks": sorted(((b["seconds"], b["block"]) for b in report["blocks"]), reverse=True)[:3],
    }


def main() -> None:
    """Run both recipes and write the results."""
    args = parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    root = args.data_root.resolve()
    (args.work_dir / "float.py").write_text(
        f"_base_ = '{CONFIG}'\n"
        "model = dict(backbone=dict(init_cfg=None))\n"
        f"train_dataloader = dict(dataset=dict(data_root='{root}/'))\n"
        f"test_dataloader = dict(dataset=dict(data_root='{root}/', indices={args.num_val}))\n"
        f"test_evaluator = dict(ann_file='{root}/annotations/instances_val2017.json')\n"
    )
    seeded_checkpoint(args.work_dir / "float.pth", args.query_key_gain)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        results = [pool.submit(run_one, run, args).result() for run in RUNS]
    summary = {
        "config": CONFIG,
        "bits": "W4A4",
        "machine": f"{platform.machine()}, {torch.__version__}",
        "runs": results,
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
