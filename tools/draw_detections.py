"""Draw a float detector's detections on an image beside those of its quantized versions.

After `make demo`, with IMAGE one of data/demo/val:

    python tools/draw_detections.py IMAGE \\
        float=work_dirs/demo/demo_mask-rcnn_swin-demo.py,demo/mask-rcnn_swin-demo.pth \\
        W4A4=work_dirs/demo/w4a4/config.py,work_dirs/demo/w4a4/quantized.pth --out detections.jpg
"""

import argparse
import sys
from pathlib import Path

import cv2
import numpy as np
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import VISUALIZERS

from apq_mmdet.engine.exit_codes import exit_code_of
from apq_mmdet.engine.options import refuse_overwriting
from apq_mmdet.errors import BadInputError, UncalibratedError
from apq_mmdet.files import check_target, known_globals


def parse_args() -> argparse.Namespace:
    """Command line of this tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", help="image to run on")
    parser.add_argument(
        "models", nargs="+", metavar="TITLE=CONFIG,CHECKPOINT", help="models from left to right, the float one first"
    )
    parser.add_argument("--out", type=Path, required=True, help="picture to write")
    parser.add_argument("--score-thr", type=float, default=0.5, help="least score of what is drawn (default: 0.5)")
    parser.add_argument("--scale", type=int, default=2, help="enlargement of the picture (default: 2)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    return parser.parse_args()


def panel(title: str, config: str, checkpoint: str, args: argparse.Namespace) -> np.ndarray:
    """The image with one model's detections and a title above, BGR uint8 [H, W, 3].

    Raises:
        BadInputError: a float checkpoint for a quantized config.
    """
    with known_globals():  # of what training leaves beside the weights; and no code is run
        model = init_detector(config, checkpoint, device=args.device)
    try:
        result = inference_detector(model, args.image)
    except UncalibratedError as error:
        raise BadInputError(f"{config} is of a quantized detector, {checkpoint} is no checkpoint of it") from error
    visualizer = VISUALIZERS.build(dict(type="DetLocalVisualizer", name=title, alpha=0.5, line_width=1))
    visualizer.dataset_meta = model.dataset_meta
    image = cv2.cvtColor(cv2.imread(args.image), cv2.COLOR_BGR2RGB)
    size = (image.shape[1] * args.scale, image.shape[0] * args.scale)
    result.pred_instances.bboxes *= args.scale
    masks = result.pred_instances.pop("masks", None)  # none of box detectors
    if masks is not None:
        enlarged = [cv2.resize(m.astype(np.uint8), size) > 0 for m in masks.cpu().numpy()]
        result.pred_instances.masks = np.array(enlarged).reshape(-1, size[1], size[0])
    image = cv2.resize(image, size, interpolation=cv2.INTER_CUBIC)
    visualizer.add_datasample(title, image, result, draw_gt=False, pred_score_thr=args.score_thr)
    drawn = cv2.cvtColor(visualizer.get_image(), cv2.COLOR_RGB2BGR)
    head = np.full((28, drawn.shape[1], 3), 255, np.uint8)
    count = int((result.pred_instances.scores >= args.score_thr).sum())
    cv2.putText(head, f"{title}: {count} objects", (6, 20), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([head, drawn])


def main() -> None:
    """Write the picture."""
    args = parse_args()
    sys.exit(exit_code_of(lambda: draw(args)))


def read_models(models: list[str]) -> list[tuple[str, str, str]]:
    """Title, config and checkpoint of each model.

    Raises:
        BadInputError: an argument of another form, or a file that is missing.
    """
    found = []
    for model in models:
        title, _, paths = model.partition("=")
        config, _, checkpoint = paths.partition(",")
        if not (title and checkpoint):
            raise BadInputError(f"expected TITLE=CONFIG,CHECKPOINT, got {model!r}")
        for path in (config, checkpoint):
            if not Path(path).is_file():
                raise BadInputError(f"{path} does not exist")
        found.append((title, config, checkpoint))
    return found


def draw(args: argparse.Namespace) -> None:
    """All models side by side.

    Raises:
        BadInputError: an image or a model that cannot be read, or a picture that cannot be written.
    """
    if cv2.imread(args.image) is None:
        raise BadInputError(f"{args.image} is no image that can be read")
    if args.scale < 1:
        raise BadInputError(f"--scale must be at least 1, got {args.scale}")
    models = read_models(args.models)
    check_target(args.out)
    refuse_overwriting([args.out], [args.image, *(path for _, *paths in models for path in paths)], "--out")
    if not cv2.haveImageWriter(str(args.out)):
        raise BadInputError(f"--out {args.out} must end in a format of pictures, such as .png")
    panels = [panel(*model, args) for model in models]
    gap = np.full((panels[0].shape[0], 6, 3), 255, np.uint8)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(args.out), np.hstack([part for p in panels for part in (p, gap)][:-1])):
        raise OSError(f"could not write {args.out}")
    print(f"{args.out} written")


if __name__ == "__main__":
    main()
