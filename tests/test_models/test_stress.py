import copy
import importlib.util
import math

import pytest
import torch
from helpers import CHECKPOINT, ROOT, build_swin
from mmengine.config import Config
from torch import nn

from apq_mmdet.calibration.transforms import NormRescaling
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import safe_load
from apq_mmdet.models.stress import _with_outliers, rescalings_by_name, stress, unevenness

CONFIG = ROOT / "configs" / "demo" / "mask-rcnn_swin-demo.py"


def stressed(seed=0, **settings):
    torch.manual_seed(0)
    swin = build_swin(stages=2)
    images = [torch.randn(1, 3, 61, 45), torch.randn(1, 3, 56, 56)]
    original = copy.deepcopy(swin)

    def run():
        with torch.no_grad():
            for image in images:
                swin(image)

    return original, swin, images, stress(swin, run, seed, **settings)


def test_the_function_stays_while_channels_get_uneven():
    original, swin, images, rows = stressed()
    with torch.no_grad():
        for image in images:
            for want, got in zip(original(image), swin(image), strict=True):
                assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    behind_norms = [row for row in rows if row.role == "input"]
    assert len(behind_norms) == 2 * 4 + 1
    assert all(10 * 0.999 < row.after < 40 * 1.001 and row.after > row.before for row in behind_norms), behind_norms
    assert {row.role for row in rows} == {"input", "query", "key", "value"}


def test_seeds_and_settings_matter():
    def weights(**settings):
        return nn.utils.parameters_to_vector(stressed(**settings)[1].parameters())

    assert torch.equal(weights(), weights())
    assert not torch.equal(weights(), weights(seed=1))
    assert max(row.after for row in stressed(peak=200.0)[3]) > 55
    assert all(
        row.after == pytest.approx(row.before, rel=1e-3) for row in stressed(spread=0.0)[3] if row.role != "input"
    )


def test_unevenness_by_hand():
    assert unevenness(torch.tensor([2.0, 1.0, 8.0])) == 4.0


def test_channels_without_extent_are_no_outliers():
    for dead in (3, 6):
        size = torch.ones(8, dtype=torch.float64)
        size[:dead] = 0
        for seed in range(5):
            factors = _with_outliers(size, torch.ones_like(size), 40.0, torch.Generator().manual_seed(seed))
            assert factors[:dead].tolist() == [1.0] * dead
            assert 10 <= float(factors.max()) <= 40
            assert unevenness(size * factors) == float(factors.max())
    lone = torch.tensor([0.0, 0.0, 3.0])
    assert _with_outliers(lone, torch.ones(3), 40.0, torch.Generator()).tolist() == [1.0] * 3
    assert unevenness(lone) == 1.0
    assert math.isnan(unevenness(torch.zeros(3)))


def test_bad_input():
    with pytest.raises(BadInputError, match="Swin backbone"):
        stress(nn.Linear(2, 2), lambda: None)
    with pytest.raises(BadInputError, match=r"peak at least 1, got 0\.5 and 0\.5"):
        stress(build_swin(), lambda: None, peak=0.5)
    for wrong in (dict(spread=math.nan), dict(spread=math.inf), dict(peak=math.nan), dict(peak=math.inf)):
        with pytest.raises(BadInputError, match="peak at least 1, got"):
            stress(build_swin(), lambda: None, **wrong)
    assert any(isinstance(p, NormRescaling) for p in rescalings_by_name(build_swin()).values())


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("stress_detector", ROOT / "tools" / "stress_detector.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def images(tmp_path):
    import cv2
    import numpy as np

    folder = tmp_path / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "0.png"), np.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=np.uint8))
    return str(folder)


def test_tool_writes_a_checkpoint_like_the_one_it_read(tool, images, tmp_path, capsys):
    out = tmp_path / "new" / "stressed.pth"
    assert tool.main([str(CONFIG), str(CHECKPOINT), str(out), "--calib-dir", images, "--num-images", "1"]) == 0
    assert "backbone.stages.0.blocks.0.norm1, input" in capsys.readouterr().out
    before = torch.load(CHECKPOINT, weights_only=True)
    after = torch.load(out, weights_only=True)
    assert after["meta"] == before["meta"]
    assert list(after["state_dict"]) == list(before["state_dict"])
    assert all(t.dtype == torch.float32 for t in after["state_dict"].values() if t.is_floating_point())
    key = "backbone.stages.0.blocks.0.norm1.weight"
    assert not torch.equal(after["state_dict"][key], before["state_dict"][key].float())
    assert list(out.parent.iterdir()) == [out]


def test_tool_keeps_the_classes_of_what_training_wrote(tool, images, tmp_path):
    content = torch.load(CHECKPOINT, weights_only=True)
    meta = {**content["meta"], "cfg": Config(dict(a=1))}
    torch.save({**content, "meta": meta}, tmp_path / "trained.pth")
    out = tmp_path / "stressed.pth"
    assert (
        tool.main([str(CONFIG), str(tmp_path / "trained.pth"), str(out), "--calib-dir", images, "--num-images", "1"])
        == 0
    )
    assert safe_load(out)["meta"] == content["meta"]


@pytest.mark.parametrize(
    ("more", "message"), [(["--spread", "nan"], "got nan and 40"), (["--peak", "0"], "got 0.5 and 0")], ids=str
)
def test_tool_refuses_before_the_work(tool, tmp_path, capsys, more, message):
    assert tool.main([str(CONFIG), str(CHECKPOINT), str(tmp_path / "out.pth"), *more]) == 2
    assert message in capsys.readouterr().err
    assert tool.main([str(CONFIG), str(CHECKPOINT), str(tmp_path)]) == 2
    assert "is a folder; name a file to write" in capsys.readouterr().err


def test_tool_does_not_overwrite_what_it_reads(tool, tmp_path, capsys):
    own = tmp_path / "float.pth"
    own.write_bytes(CHECKPOINT.read_bytes())
    assert tool.main([str(CONFIG), str(own), str(tmp_path / "." / "float.pth")]) == 2
    assert f"would overwrite {own}" in capsys.readouterr().err
    assert own.read_bytes() == CHECKPOINT.read_bytes()


def test_tool_refuses_other_backbones(tool, tmp_path, capsys):
    path = tmp_path / "resnet.py"
    path.write_text(
        "model = dict(type='RetinaNet', backbone=dict(type='ResNet', depth=18, init_cfg=None),"
        "neck=dict(type='FPN', in_channels=[64, 128, 256, 512], out_channels=8, num_outs=5),"
        "bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8, feat_channels=8,"
        "anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[1.0],"
        "strides=[8, 16, 32, 64, 128])))\n"
    )
    assert tool.main([str(path), str(CHECKPOINT), str(tmp_path / "out.pth")]) == 2
    assert "Swin backbone" in capsys.readouterr().err
    assert not (tmp_path / "out.pth").exists()
