import importlib.util

import cv2
import numpy as np
import pytest
import torch
from helpers import CHECKPOINT, ROOT
from mmdet.apis import inference_detector, init_detector
from mmengine.logging import HistoryBuffer

from apq_mmdet.datasets.demo import demo_image

CONFIG = ROOT / "configs" / "demo" / "mask-rcnn_swin-demo.py"
QUANTIZED = CONFIG.with_name("mask-rcnn_swin-demo_apq-w8a8.py")


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """The tool on an image, called with models and a picture to write; returns its exit code."""
    spec = importlib.util.spec_from_file_location("draw_detections", ROOT / "tools" / "draw_detections.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    image = tmp_path / "image.png"
    cv2.imwrite(str(image), np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))

    def call(out, *models):
        monkeypatch.setattr("sys.argv", ["draw_detections.py", str(image), *map(str, models), "--out", str(out)])
        with pytest.raises(SystemExit) as ended:
            tool.main()
        return ended.value.code

    return call


def test_models_side_by_side_also_of_checkpoints_that_training_wrote(draw, tmp_path):
    trained = tmp_path / "trained.pth"
    history = {"log_scalars": {"loss": HistoryBuffer([1.0], [1])}}
    torch.save({**torch.load(CHECKPOINT, weights_only=True), "message_hub": history}, trained)
    out = tmp_path / "new" / "picture.png"
    assert draw(out, f"a={CONFIG},{CHECKPOINT}", f"b={CONFIG},{trained}") == 0
    picture = cv2.imread(str(out))
    assert picture.shape == (28 + 2 * 90, 2 * 2 * 120 + 6, 3)  # titles above, a gap between
    assert all(part.std() > 0 for part in (picture[28:, :240], picture[28:, 246:]))


def test_detections_are_drawn_where_they_are(draw, tmp_path):
    path, out, model = tmp_path / "image.png", tmp_path / "picture.png", f"a={CONFIG},{CHECKPOINT}"
    image, _ = demo_image(0, "val", 0)
    cv2.imwrite(str(path), image)
    plain = cv2.resize(image, (2 * image.shape[1], 2 * image.shape[0]), interpolation=cv2.INTER_CUBIC)
    assert draw(out, model, "--score-thr", 1.1) == 0
    assert np.array_equal(cv2.imread(str(out))[28:], plain)
    assert draw(out, model) == 0
    changed = (cv2.imread(str(out))[28:] != plain).any(2)
    found = inference_detector(init_detector(str(CONFIG), str(CHECKPOINT), device="cpu"), str(path)).pred_instances
    boxes = (2 * found.bboxes[found.scores >= 0.5]).round().int().clamp(min=1).tolist()
    assert boxes
    for left, top, right, bottom in boxes:
        rows, columns = slice(top + 2, bottom - 2), slice(left + 2, right - 2)
        sides = [changed[rows, max(0, x - 2) : x + 3].any(1) for x in (left, right)]
        sides += [changed[max(0, y - 2) : y + 3, columns].any(0) for y in (top, bottom)]
        assert min(side.mean() for side in sides) > 0.9


@pytest.mark.parametrize(
    ("name", "model", "message"),
    [
        ("picture", f"a={CONFIG},{CHECKPOINT}", "must end in a format of pictures, such as .png"),
        (".", f"a={CONFIG},{CHECKPOINT}", "is a folder; name a file to write"),
        ("picture.png", f"a={CONFIG}", "expected TITLE=CONFIG,CHECKPOINT"),
        ("picture.png", f"a={CONFIG},none.pth", "none.pth does not exist"),
        ("picture.png", f"={CONFIG},{CHECKPOINT}", "expected TITLE=CONFIG,CHECKPOINT, got '="),
        ("picture.png", f"a={QUANTIZED},{CHECKPOINT}", "is no checkpoint of it"),
        ("image.png", f"a={CONFIG},{CHECKPOINT}", "--out: the run would overwrite"),
    ],
)
def test_bad_input(draw, tmp_path, capsys, name, model, message):
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert draw(tmp_path / name, model) == 2
    assert message in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_picture_of_no_size_is_refused(draw, tmp_path, capsys):
    assert draw(tmp_path / "picture.png", f"a={CONFIG},{CHECKPOINT}", "--scale", "0") == 2
    assert "--scale must be at least 1, got 0" in capsys.readouterr().err


def test_models_that_a_picture_is_drawn_with_are_not_overwritten(draw, tmp_path, capsys):
    weights = tmp_path / "weights.png"
    weights.write_bytes(b"weights")
    assert draw(weights, f"a={CONFIG},{CHECKPOINT}", f"b={CONFIG},{weights}") == 2
    assert f"--out: the run would overwrite {weights}" in capsys.readouterr().err
    assert weights.read_bytes() == b"weights"
