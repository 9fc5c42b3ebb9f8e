"""The benchmark on more val images: what it evaluates, what it keeps, and the drawn images it uses."""

import json

import more_images
import pytest
from mmengine.config import Config

CONFIG = "configs/demo/mask-rcnn_swin-demo.py"


@pytest.fixture
def evaluated(monkeypatch):
    """Configs and checkpoints that were evaluated; their AP is how many there were."""
    seen = []

    def evaluate(config, checkpoint, data, work_dir):
        seen.append((config, checkpoint))
        return [float(len(seen)), 10.0 * len(seen)]

    monkeypatch.setattr(more_images, "evaluate", evaluate)
    return seen


def options(tmp_path, *runs, seed=1):
    for run in runs:
        (tmp_path / run).mkdir(parents=True, exist_ok=True)
        (tmp_path / run / "quantized.pth").write_text(run)
    (tmp_path / "float.pth").write_text("float")
    line = [
        "float.py",
        str(tmp_path / "float.pth"),
        *(str(tmp_path / run) for run in runs),
        "--num-val",
        "1",
        "--seed",
        str(seed),
    ]
    return [*line, "--data", str(tmp_path / "data"), "--out", str(tmp_path / "results.json")]


def test_the_float_detector_and_each_run_once(evaluated, tmp_path):
    more_images.main(options(tmp_path, "a"))
    more_images.main(options(tmp_path, "a", "b"))
    files = [(str(tmp_path / run / "config.py"), str(tmp_path / run / "quantized.pth")) for run in "ab"]
    assert evaluated == [("float.py", str(tmp_path / "float.pth")), *files]
    assert found_in(tmp_path) == {"float": [1.0, 10.0], "a": [2.0, 20.0], "b": [3.0, 30.0]}


def found_in(tmp_path):
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["images"] == {"seed": 1, "number": 1}
    return {name: found["box_and_mask_ap"] for name, found in results["detectors"].items()}


def test_a_run_that_was_made_again_is_evaluated_again(evaluated, tmp_path):
    line = options(tmp_path, "a", "b")
    more_images.main(line)
    (tmp_path / "a" / "quantized.pth").write_text("another")
    more_images.main(line)
    assert found_in(tmp_path) == {"float": [1.0, 10.0], "a": [4.0, 40.0], "b": [3.0, 30.0]}


def test_results_on_other_images_are_not_overwritten(evaluated, tmp_path):
    more_images.main(options(tmp_path, "a"))
    with pytest.raises(SystemExit, match=r"results.json holds results on other images"):
        more_images.main(options(tmp_path, "a", seed=2))
    assert len(evaluated) == 2
    assert found_in(tmp_path) == {"float": [1.0, 10.0], "a": [2.0, 20.0]}


def test_the_drawn_images_are_evaluated(monkeypatch, tmp_path):
    configs = []

    class Runner:
        def __init__(self, cfg):
            configs.append(cfg)

        from_cfg = classmethod(lambda cls, cfg: cls(cfg))

        def test(self):
            return {"coco/bbox_mAP": 0.514, "coco/segm_mAP": 0.5051}

    monkeypatch.setattr(more_images, "Runner", Runner)
    assert more_images.evaluate(CONFIG, "some.pth", tmp_path, tmp_path / "logs") == [51.4, 50.5]
    (cfg,) = configs
    assert cfg.load_from == "some.pth"
    assert cfg.test_dataloader.dataset.data_root == f"{tmp_path}/"
    assert cfg.test_evaluator.ann_file == f"{tmp_path}/annotations/instances_val.json"
    assert Config.fromfile(CONFIG).test_dataloader.dataset.data_root == "data/demo/"


def test_a_run_that_is_called_like_another_is_refused(tmp_path, capsys):
    for runs in (("x/a", "y/a"), ("float",)):
        with pytest.raises(SystemExit):
            more_images.main(options(tmp_path, *runs))
    assert "two runs are called float" in capsys.readouterr().err
