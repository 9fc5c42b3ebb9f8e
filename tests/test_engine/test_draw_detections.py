import importlib.util

import cv2
import numpy as np
import pytest
import torch
from helpers import CHECKPOINT, ROOT
from mmengine.logging import HistoryBuffer

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
