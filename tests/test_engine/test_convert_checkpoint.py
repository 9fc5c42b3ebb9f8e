"""Foreign checkpoints, written here key by key as their authors' code names them, become such of mmdet 3."""

import importlib.util
import re
from collections import OrderedDict
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from helpers import CHECKPOINT, ROOT
from microsoft import SWIN, as_microsoft, index_by_hand, microsoft_detector
from mmdet.apis import init_detector
from mmdet.models.backbones import SwinTransformer
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner.checkpoint import load_checkpoint
from torch import nn
from torch.nn import functional as F

from apq_mmdet.engine.foreign_checkpoints import MICROSOFT, MMDET2, convert
from apq_mmdet.errors import BadInputError
from apq_mmdet.models.timm_import import import_timm

DEMO_CONFIG = ROOT / "configs" / "demo" / "mask-rcnn_swin-demo.py"
MMDET_CONFIGS = Path(mmdet.__file__).parent / ".mim" / "configs"


@pytest.fixture
def without_init(monkeypatch):
    """Models are built without filling their weights."""
    for name in ("kaiming_uniform_", "kaiming_normal_", "uniform_", "normal_", "trunc_normal_", "xavier_uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    """The demo detector as mmdet 3 has it."""
    return torch.load(CHECKPOINT, weights_only=True)["state_dict"]


def timm_swin(size):
    """timm's Swin, which computes what Microsoft's does once it shifts padded maps, with random weights."""
    create = import_timm().create_model
    kind = {"t": "tiny", "s": "small", "b": "base"}[size]
    options = dict(pretrained=False, num_classes=0, strict_img_size=False, always_partition=True, weight_init="skip")
    model = create(f"swin_{kind}_patch4_window7_224", **options).double().eval()
    for parameter in model.parameters():
        fan_in = parameter[0].numel()
        nn.init.normal_(parameter, std=0.5 if parameter.dim() == 1 else fan_in**-0.5)
    for stage in model.layers:
        for block in stage.blocks:
            block._attn = padded_first(block._attn)
    return model


def padded_first(attention):
    """timm rolls a map before it pads it to whole windows; Microsoft and mmdet pad it first."""

    def padded(x):
        height, width = x.shape[1:3]
        return attention(F.pad(x, (0, 0, 0, -width % 7, 0, -height % 7)))[:, :height, :width]

    return padded


def as_detection_backbone(model):
    """timm's weights in Microsoft's layout: patch merging at the end of a stage, a norm for each stage's output."""
    state = OrderedDict()
    for key, value in model.state_dict().items():
        first, _, rest = key.partition(".")
        if first == "layers":
            stage, _, rest = rest.partition(".")
            state[f"backbone.layers.{int(stage) - rest.startswith('downsample')}.{rest}"] = value
        elif first == "patch_embed":
            state[f"backbone.{key}"] = value
    for name, module in model.named_modules():
        if hasattr(module, "relative_position_index"):
            state[f"backbone.{name}.relative_position_index"] = module.relative_position_index
    for i, stage in enumerate(model.feature_info):
        state[f"backbone.norm{i}.weight"] = torch.randn(stage["num_chs"]).double()
        state[f"backbone.norm{i}.bias"] = torch.randn(stage["num_chs"]).double()
    return state


def timm_features(model, norms, image):
    features = []
    x = model.patch_embed(image)
    for i, stage in enumerate(model.layers):
        x = stage(x)  # (1, height, width, channels)
        norm = [norms[f"backbone.norm{i}.{part}"] for part in ("weight", "bias")]
        features.append(F.layer_norm(x, x.shape[-1:], *norm).permute(0, 3, 1, 2))
    return features


@pytest.mark.parametrize("size", SWIN)
@torch.no_grad()
def test_converted_backbones_compute_what_timm_does(size):
    """Maps of 56 to 7 are whole windows; 27 x 19, 14 x 10, 7 x 5 and 4 x 3 need padding, and odd ones at merging."""
    original = timm_swin(size)
    state = as_detection_backbone(original)
    conversion = convert({"state_dict": state | {"rpn_head.rpn_conv.weight": torch.ones(1)}}, "a.pth")
    backbone = SwinTransformer(**SWIN[size], drop_path_rate=0.0).double()
    backbone.eval()
    own = {k.removeprefix("backbone."): v for k, v in conversion.state.items() if k.startswith("backbone.")}
    backbone.load_state_dict(own, strict=True)
    for shape in [(108, 76)] + [(224, 224)] * (size == "t"):
        image = torch.randn(1, 3, *shape, dtype=torch.float64)
        for found, expected in zip(backbone(image), timm_features(original, state, image), strict=True):
            assert found.shape == expected.shape
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
            assert expected.std() > 0.1


def detector_config(size, heads):
    if heads == "cascade":
        name = f"cascade-mask-rcnn_swin-{size}-p4-w7_fpn_4conv1fc-giou-ms-crop-3x_coco.py"
        return Config.fromfile(ROOT / "configs" / "cascade" / name)
    cfg = Config.fromfile(MMDET_CONFIGS / "swin" / "mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py")
    cfg.model.backbone.update(SWIN[size])
    cfg.model.neck.in_channels = [SWIN[size]["embed_dims"] * 2**i for i in range(4)]
    return cfg


@pytest.mark.parametrize("size", SWIN)
@pytest.mark.parametrize("heads", ["mask", "cascade"])
def test_every_key_of_a_detector_is_used_once(size, heads, without_init):
    state = microsoft_detector(size, heads)
    conversion = convert({"state_dict": state, "meta": {"mmdet_version": "2.11.0"}, "amp": {}}, "a.pth")
    assert conversion.kind == MICROSOFT
    assert not conversion.dropped
    assert not conversion.derived
    assert conversion.names.keys() == state.keys()
    assert sorted(conversion.names.values()) == sorted(conversion.state)
    moved = {k for k, v in conversion.names.items() if ".downsample." in v}
    assert len(moved) == 9
    for key in state.keys() - moved:
        assert conversion.state[conversion.names[key]] is state[key]
    register_all_modules()
    model = MODELS.build(detector_config(size, heads).model)
    model.load_state_dict(conversion.state, strict=True)


def test_a_detector_comes_back_value_by_value(demo):
    conversion = convert({"state_dict": as_microsoft(demo)}, "a.pth")
    assert list(conversion.state) == list(demo)
    assert all(torch.equal(value, demo[key]) for key, value in conversion.state.items())
    lines = conversion.summary().splitlines()
    assert lines[0] == f"a detector of {MICROSOFT}, {len(demo)} keys"
    counts = {line.strip().partition(" ")[2]: int(line.split()[0]) for line in lines[1:4]}
    assert counts.keys() == {"renamed", "unchanged", "renamed and re-ordered (patch merging)"}
    assert counts["renamed and re-ordered (patch merging)"] == 9
    assert sum(counts.values()) == len(demo)


def test_masks_go_and_position_indices_come(demo):
    old = as_microsoft(demo)
    old["backbone.layers.0.blocks.1.attn_mask"] = torch.zeros(4, 49, 49)
    lacking = [key for key in demo if key.endswith("relative_position_index")]
    old = {f"module.{k}": v for k, v in old.items() if not k.endswith("relative_position_index")}
    conversion = convert({"state_dict": old}, "a.pth")
    assert set(conversion.dropped) == {"module.backbone.layers.0.blocks.1.attn_mask"}
    assert conversion.derived == lacking
    assert conversion.names.keys() | conversion.dropped.keys() == old.keys()
    assert all(torch.equal(conversion.state[key], index_by_hand()) for key in lacking)
    assert "1 dropped (masks of shifted windows" in conversion.summary()
    assert "12 added (relative_position_index" in conversion.summary()


def test_detectors_of_mmdet_2(without_init):
    """ResNet-50 Mask R-CNN as its training left it: distributed, averaged, with an optimizer's state."""
    register_all_modules()
    model = MODELS.build(Config.fromfile(MMDET_CONFIGS / "mask_rcnn" / "mask-rcnn_r50_fpn_1x_coco.py").model)
    own = model.state_dict()
    old = {f"module.{key}": value for key, value in own.items()}
    averaged = {f"module.ema_{key.replace('.', '_')}": torch.zeros(1) for key in own}
    meta = {"mmdet_version": "2.28.2+e9cae2d", "CLASSES": ("a", "b"), "PALETTE": [(1, 2, 3), (4, 5, 6)], "config": "x"}
    conversion = convert({"state_dict": {**old, **averaged}, "meta": meta, "optimizer": {}}, "a.pth")
    assert conversion.kind == MMDET2
    assert conversion.dropped.keys() == averaged.keys()
    assert conversion.names == {f"module.{key}": key for key in own}
    assert all(conversion.state[key] is old[f"module.{key}"] for key in own)
    assert conversion.meta == {
        "converted_from": "mmdet 2.x (mmdet 2.28.2+e9cae2d)",
        "dataset_meta": {"classes": ("a", "b"), "palette": [(1, 2, 3), (4, 5, 6)]},
    }
    assert conversion.left == ["optimizer"]
    assert convert({**old, **averaged}, "a.pth").names == conversion.names  # told by the copies alone


def test_class_names_are_coco_s_only_for_80_classes():
    state = microsoft_detector("t", "cascade")
    assert len(convert({"state_dict": state}, "a.pth").meta["dataset_meta"]["classes"]) == 80
    named = convert({"state_dict": state, "meta": {"CLASSES": ["x"] * 80}}, "a.pth")
    assert named.meta["dataset_meta"] == {"classes": ("x",) * 80}
    colourless = convert({"state_dict": state, "meta": {"CLASSES": ["x"] * 80, "PALETTE": [None]}}, "a.pth")
    assert colourless.meta["dataset_meta"] == {"classes": ("x",) * 80}
    for stage in range(3):  # all of them have to say so
        state[f"roi_head.bbox_head.{stage}.fc_cls.bias"] = torch.zeros(80)
        other = convert({"state_dict": state}, "a.pth")
        assert "dataset_meta" not in other.meta
    assert "class names: unknown" in other.summary()


def bare(state):
    return {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}


def broken_index(state):
    key = "backbone.layers.1.blocks.0.attn.relative_position_index"
    return {**state, key: state[key].T.contiguous()}


REFUSED = {
    "classifier": (lambda old, new: {"model": bare(old) | {"head.weight": torch.ones(1)}}, "a classifier or a bare"),
    "bare backbone": (lambda old, new: bare(old), "no detector of mmdet but layers, norm0"),
    "mmpretrain": (
        lambda old, new: {"state_dict": {"backbone.conv1.weight": torch.ones(1), "head.fc.weight": torch.ones(1)}},
        "no detector of mmdet but backbone, head",
    ),
    "mmdet 3": (lambda old, new: {"state_dict": new, "meta": {"mmengine_version": "0.10"}}, "nothing has to be done"),
    "DETR of mmdet 3": (
        lambda old, new: {"state_dict": new | {"decoder.x": torch.ones(1)}, "meta": {"mmengine_version": "0.10"}},
        "nothing has to be done",
    ),
    "MaskFormer of mmdet 3": (
        lambda old, new: {
            "state_dict": {"backbone.x": torch.ones(1), "panoptic_head.x": torch.ones(1)},
            "meta": {"mmengine_version": "0.10", "CLASSES": ["a"]},
        },
        "nothing has to be done",
    ),
    "bare mmdet 3": (lambda old, new: dict(new), "nothing has to be done"),
    "converted": (lambda old, new: convert_again(old), "nothing has to be done"),
    "mmdet 1": (lambda old, new: {"state_dict": new, "meta": {"mmdet_version": "1.2.0"}}, "mmdet 1.2.0, whose class"),
    "quantized": (
        lambda old, new: {"state_dict": new | {"apq_format_version": torch.ones(1)}},
        "already quantized, by apq_mmdet",
    ),
    "DETR": (
        lambda old, new: {"state_dict": {"backbone.x": torch.ones(1), "bbox_head.transformer.x": torch.ones(1)}},
        "DETR or MaskFormer family",
    ),
    "MaskFormer": (
        lambda old, new: {"state_dict": {"backbone.x": torch.ones(1), "panoptic_head.x": torch.ones(1)}},
        "DETR or MaskFormer family",
    ),
    "no weights": (lambda old, new: {"meta": {}, "epoch": 3}, "holds no state_dict"),
    "a tensor": (lambda old, new: torch.ones(2), "holds no state_dict"),
    "empty": (lambda old, new: {"state_dict": {}}, "holds no state_dict"),
    "unknown part": (lambda old, new: {"state_dict": old | {"teacher.x": torch.ones(1)}}, "unknown part 'teacher'"),
    "Swin V2": (
        lambda old, new: {"state_dict": old | {"backbone.layers.0.blocks.0.attn.logit_scale": torch.ones(1)}},
        r"unknown key 'backbone\.layers\.0\.blocks\.0\.attn\.logit_scale'",
    ),
    "absolute positions": (
        lambda old, new: {"state_dict": old | {"backbone.absolute_pos_embed": torch.ones(1)}},
        "absolute_pos_embed.* resizes",
    ),
    "other positions": (
        lambda old, new: {"state_dict": broken_index(old)},
        r"stages\.1.*not the one of square windows",
    ),
    "oblong windows": (lambda old, new: {"state_dict": oblong(old)}, r"stages\.1.*not the one of square windows"),
    "three patches": (
        lambda old, new: {"state_dict": old | {"backbone.layers.0.downsample.norm.weight": torch.ones(3)}},
        r"layers\.0\.downsample\.norm\.weight' is not of four patches, its shape is \[3\]",
    ),
    "numbers for names": (lambda old, new: {"state_dict": {1: torch.ones(1)}}, "holds no state_dict"),
    "two keys for one": (
        lambda old, new: {"state_dict": old | {"module.neck.fpn_convs.0.conv.bias": torch.ones(1)}},
        r"'module\.neck.*both become 'neck\.fpn_convs\.0\.conv\.bias'",
    ),
}


def oblong(state):
    name = "backbone.layers.1.blocks.0.attn.relative_position_"
    kept = {k: v for k, v in state.items() if not k.endswith("relative_position_index")}
    return {**kept, f"{name}bias_table": torch.zeros(13 * 11, 4)}


def convert_again(state):
    first = convert({"state_dict": state}, "a.pth")
    return {"state_dict": first.state, "meta": first.meta}


@pytest.mark.parametrize("kind", REFUSED)
def test_everything_else_is_refused(kind, demo):
    make, message = REFUSED[kind]
    with pytest.raises(BadInputError, match=message):
        convert(make(as_microsoft(demo), demo), "a.pth")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_the_tool_writes_what_mmdet_loads(tool, demo, tmp_path, capsys, zipped):
    source, target = tmp_path / "old.pth", tmp_path / "new" / "new.pth"
    names = tuple("abcdefgh")
    meta = {"mmdet_version": "2.11.0", "CLASSES": names, "PALETTE": [np.array([1, 2, 3])] * 8}
    content = {"state_dict": as_microsoft(demo), "meta": meta, "amp": {}}
    torch.save(content, source, _use_new_zipfile_serialization=zipped)
    assert tool.main([str(source), str(target), "--config", str(DEMO_CONFIG)]) == 0
    out = capsys.readouterr().out
    assert f"{source}: a detector of {MICROSOFT}" in out
    assert "not carried over: amp" in out
    assert f"fits {DEMO_CONFIG}" in out
    assert torch.load(target, weights_only=True)["meta"]["dataset_meta"] == {
        "classes": names,
        "palette": [(1, 2, 3)] * 8,
    }
    model = init_detector(str(DEMO_CONFIG), str(target), device="cpu")
    assert model.dataset_meta["classes"] == names
    load_checkpoint(model, str(target), strict=True)
    for key, value in model.state_dict().items():
        assert torch.equal(value, demo[key].to(value.dtype)), key
    assert tool.main([str(target), str(tmp_path / "again.pth")]) == 2
    assert "nothing has to be done" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(missing="roi_head.bbox_head.fc_cls.bias"), r'Missing key.*"roi_head\.bbox_head\.fc_cls\.bias"'),
        (dict(extra="roi_head.mask_head.0.x"), r'Unexpected key.*"roi_head\.mask_head\.0\.x"'),
        (dict(reshaped="neck.fpn_convs.0.conv.bias"), r"size mismatch for neck\.fpn_convs\.0\.conv\.bias.*\[64\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_config(tool, demo, tmp_path, capsys, change, message):
    state = as_microsoft(demo)
    state.pop(change.get("missing"), None)
    state |= {change[how]: torch.ones(3) for how in ("extra", "reshaped") if how in change}
    torch.save({"state_dict": state}, tmp_path / "old.pth")
    assert tool.main([str(tmp_path / "old.pth"), str(tmp_path / "new.pth"), "--config", str(DEMO_CONFIG)]) == 2
    error = capsys.readouterr().err
    assert f"does not fit config {DEMO_CONFIG}" in error
    assert not (tmp_path / "new.pth").exists()
    assert re.search(message, error)


def test_what_the_tool_refuses(tool, demo, tmp_path, capsys):
    source = tmp_path / "old.pth"
    torch.save({"state_dict": as_microsoft(demo)}, source)
    content = source.read_bytes()

    def refused(*arguments):
        assert tool.main([str(a) for a in arguments]) == 2
        return capsys.readouterr().err

    quantized = DEMO_CONFIG.with_name("mask-rcnn_swin-demo_apq-w8a8.py")
    assert "quantizes its model" in refused(source, tmp_path / "new.pth", "--config", quantized)
    assert "does not exist" in refused(tmp_path / "absent.pth", tmp_path / "new.pth")
    assert "cannot be read" in refused(source, tmp_path / "new.pth", "--config", tmp_path / "absent.py")
    (tmp_path / "empty.py").write_text("a = 1\n")
    assert "no model can be built" in refused(source, tmp_path / "new.pth", "--config", tmp_path / "empty.py")
    assert "is the source itself" in refused(source, source)
    assert "DST: the run would overwrite" in refused(source, tmp_path / "empty.py", "--config", tmp_path / "empty.py")
    assert (tmp_path / "empty.py").read_text() == "a = 1\n"
    assert "is a folder" in refused(source, tmp_path)
    assert "old.pth is a file" in refused(source, source / "below.pth")
    assert source.read_bytes() == content
    assert [path.name for path in tmp_path.glob("*.pth")] == ["old.pth"]
