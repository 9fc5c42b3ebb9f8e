"""The benchmark of feature errors, on stand-ins of detectors whose features are known."""

import json
from types import SimpleNamespace

import feature_error
import pytest
import torch

LEVELS = [torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[12.0]]]])]  # squares sum up to 169


def detector(shift):
    """Both levels are off by ``shift`` in every element."""
    return SimpleNamespace(
        data_preprocessor=lambda image: {"inputs": image["inputs"]},
        extract_feat=lambda inputs: tuple(inputs * level + shift for level in LEVELS),
    )


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Work dirs of two runs, whose features are off by 2 and by 1."""
    shifts = {"config.py": 0.0, str(tmp_path / "far" / "config.py"): 2.0, str(tmp_path / "near" / "config.py"): 1.0}
    monkeypatch.setattr(feature_error, "init_detector", lambda config, checkpoint, device: detector(shifts[config]))
    monkeypatch.setattr(feature_error, "val_images", lambda config, number: [{"inputs": 1.0}, {"inputs": 2.0}][:number])
    return [tmp_path / "far", tmp_path / "near"]


@pytest.mark.parametrize(("images", "energy"), [(1, 169), (2, 169 + 4 * 169)])
def test_error_over_all_levels_and_images_the_best_first(runs, tmp_path, images, energy):
    out = tmp_path / "results" / "errors.json"
    feature_error.main(["config.py", "float.pth", *map(str, runs), "--num-val", str(images), "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["images"] == images
    assert list(found["relative_error"]) == ["near", "far"]
    elements = 3 * images
    assert found["relative_error"]["near"] == pytest.approx(elements / energy, rel=5e-3)
    assert found["relative_error"]["far"] == pytest.approx(4 * elements / energy, rel=5e-3)


def test_runs_of_one_name_are_refused(runs, tmp_path, capsys):
    with pytest.raises(SystemExit):
        feature_error.main(["config.py", "float.pth", "a/run", "b/run", "--out", str(tmp_path / "errors.json")])
    assert "two runs are called run" in capsys.readouterr().err


def test_the_float_features_have_no_error():
    features = feature_error.features(detector(0.0), [{"inputs": 1.0}])
    assert feature_error.relative_error(features, [LEVELS]) == 0.0
