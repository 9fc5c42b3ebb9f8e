"""The shipped configs: each is what its file name says, and the metafiles tell mim of all of them."""

import json
import re
from copy import deepcopy
from functools import cache
from pathlib import Path

import mmdet
import pytest
import torch
import yaml
from helpers import ROOT, recipe
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.hub import get_config
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.engine import save_quantized
from apq_mmdet.engine.quantized_config import load_recipe
from apq_mmdet.layers import quantized_layers
from apq_mmdet.models import QuantizedDetector, detection_task

register_all_modules()
EVERY = sorted((ROOT / "configs").rglob("*.py"))
MODEL_CONFIGS = [path for path in EVERY if "_base_" not in str(path.relative_to(ROOT))]
METAFILES = [ROOT / "configs" / folder / "metafile.yml" for folder in ("cascade", "swin")]
WITHOUT_COCO_WEIGHTS = {"demo", "timm"}  # nobody has published any: the metafiles leave them out
QUANTIZED = re.compile(r"(?P<float>.+)_(?P<recipe>[a-z0-9-]+)-w(?P<w_bits>\d)a(?P<a_bits>\d)")
DETECTORS = {"mask-rcnn": "MaskRCNN", "cascade-mask-rcnn": "CascadeRCNN"}
MASK_3X = "swin/mask-rcnn_swin-{}-p4-w7_fpn_amp-ms-crop-3x_coco"
CASCADE_3X = "cascade/cascade-mask-rcnn_swin-{}-p4-w7_fpn_4conv1fc-giou-ms-crop-3x_coco"
# Millions of parameters in the README of Swin-Transformer-Object-Detection, and the backbone's blocks
FAMILIES = {
    "swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco": (48, 12),
    MASK_3X.format("t"): (48, 12),
    MASK_3X.format("s"): (69, 24),
    CASCADE_3X.format("t"): (86, 12),
    CASCADE_3X.format("s"): (107, 24),
    CASCADE_3X.format("b"): (145, 24),
}


@cache
def read(path):
    return Config.fromfile(path)


def config(name):
    return read(ROOT / "configs" / f"{name}.py")


def settings_of(cfg):
    """Plain containers, without ``quant`` and the marks of inheritance."""
    if isinstance(cfg, dict):
        return {key: settings_of(value) for key, value in cfg.items() if key not in ("_scope_", "quant")}
    return [settings_of(value) for value in cfg] if isinstance(cfg, list | tuple) else cfg


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_is_readable(path):
    assert len(read(path)) > 0


@pytest.mark.parametrize("path", MODEL_CONFIGS, ids=lambda path: path.stem)
def test_is_what_its_name_says(path):
    cfg = read(path)
    detector = DETECTORS[path.stem.split("_")[0]]
    named = QUANTIZED.fullmatch(path.stem)
    if named is None:
        assert cfg.model.type == detector
        assert "quant" not in cfg.model
        return
    assert cfg.model.type == f"apq_mmdet.{detector}"
    bits = {key: int(named[key]) for key in ("w_bits", "a_bits")}
    name = named["recipe"].replace("-", "_")
    # timm's modules have other names, which a format may speak of
    formats = {"formats": cfg.model.quant.formats} if path.parent.name == "timm" else {}
    assert cfg.model.quant == {**load_recipe(name), "recipe": name, "scope": "backbone", **bits, **formats}
    same = settings_of(dict(read(path.with_name(f"{named['float']}.py"))))
    assert settings_of(dict(cfg)) == {**same, "model": {**same["model"], "type": cfg.model.type}}


@pytest.mark.parametrize("family", FAMILIES)
def test_has_three_widths_of_two_recipes(family):
    folder, stem = (ROOT / "configs" / family).parent, family.split("/")[1]
    found = {path.stem for path in folder.glob(f"{stem}*.py")}
    assert found == {stem, *(f"{stem}_{r}-w{b}a{b}" for r in ("apq", "apq-plus") for b in (4, 6, 8))}


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_published_detector_with_a_quantized_backbone(family):
    millions, blocks = FAMILIES[family]
    model = MODELS.build(config(f"{family}_apq-plus-w4a4").model)
    assert isinstance(model, QuantizedDetector)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    names = [name for name, _ in quantized_layers(model)]
    assert len(names) == 1 + 6 * blocks + 3  # patch embedding; four linears and two products; three mergings
    assert all(name.startswith("backbone.") for name in names)


@pytest.mark.parametrize("size", "tsb")
def test_cascade_is_trained_as_mask_rcnn_and_keeps_nothing_of_convnext(size):
    cfg = config(CASCADE_3X.format(size))
    like = get_config("mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py")
    for key in ("train_dataloader", "train_cfg", "param_scheduler", "optim_wrapper", "test_dataloader"):
        assert settings_of(cfg[key]) == settings_of(like[key]), key
    assert "next" not in str(cfg.to_dict()).lower()
    assert not cfg.custom_imports  # no package beside mmdet


def test_cascade_is_written_down_as_it_is():
    cfg = config(f"{CASCADE_3X.format('t')}_apq-w4a4")
    assert Config.fromstring(cfg.pretty_text, ".py").to_dict() == cfg.to_dict()


@pytest.mark.parametrize("size", "tsb")
def test_cascade_heads(size):
    heads = config(CASCADE_3X.format(size)).model.roi_head.bbox_head
    assert [head.bbox_coder.target_stds[::2] for head in heads] == [[0.1, 0.2], [0.05, 0.1], [0.033, 0.067]]
    for head in heads:
        assert (head.type, head.num_shared_convs, head.num_shared_fcs) == ("ConvFCBBoxHead", 4, 1)
        assert (head.norm_cfg.type, head.reg_decoded_bbox, head.reg_class_agnostic) == ("SyncBN", True, False)
        assert (head.loss_bbox.type, head.loss_bbox.loss_weight) == ("GIoULoss", 10.0)


@pytest.mark.parametrize(
    ("size", "width", "depths", "drop"),
    [("t", 96, [2, 2, 6, 2], 0.2), ("s", 96, [2, 2, 18, 2], 0.2), ("b", 128, [2, 2, 18, 2], 0.3)],
)
def test_cascade_backbones(size, width, depths, drop):
    model = config(CASCADE_3X.format(size)).model
    swin = model.backbone
    assert (swin.embed_dims, swin.depths, swin.drop_path_rate) == (width, depths, drop)
    assert swin.num_heads == [width // 32 * 2**stage for stage in range(4)]
    assert model.neck.in_channels == [width * 2**stage for stage in range(4)]


def narrow(cfg):
    """A copy of a cascade's config with few channels."""
    cfg = deepcopy(cfg)
    cfg.model.backbone.update(embed_dims=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), init_cfg=None)
    cfg.model.neck.update(in_channels=[8, 16, 32, 64], out_channels=16)
    cfg.model.rpn_head.update(in_channels=16, feat_channels=16)
    heads = cfg.model.roi_head
    for part in (heads.bbox_roi_extractor, heads.mask_roi_extractor):
        part.out_channels = 16
    for head in heads.bbox_head:
        head.update(in_channels=16, conv_out_channels=16, fc_out_channels=32, num_classes=3)
    heads.mask_head.update(in_channels=16, conv_out_channels=16, num_classes=3)
    cfg.test_dataloader.dataset.pipeline[1].scale = (96, 96)
    return cfg


def test_cascade_runs_on_a_cpu(tmp_path):
    """Calibrated as a whole with its SyncBN, saved, and loaded by mmdet's own function."""
    cfg = narrow(config(f"{CASCADE_3X.format('t')}_apq-w8a8"))
    cfg.model.quant = {**load_recipe("minmax"), "scope": "detector"}
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.SyncBatchNorm)]
    assert len(norms) == 3 * 4
    for norm in norms:
        nn.init.uniform_(norm.running_var, 0.5, 2)
    meta = dict(img_shape=(96, 80), ori_shape=(96, 80), scale_factor=(1.0, 1.0))
    image = torch.randint(0, 256, (96, 80, 3), dtype=torch.uint8)
    sample = dict(inputs=image.permute(2, 0, 1), data_samples=DetDataSample(metainfo=meta))
    calibrate(model, [sample], recipe("minmax", scope="detector"), detection_task(model))
    save_quantized(model, tmp_path / "quantized.pth", dict(dataset_meta=dict(classes=list("abc"))))
    loaded = init_detector(cfg, str(tmp_path / "quantized.pth"), device="cpu")
    with torch.no_grad():
        want = model.test_step(dict(inputs=[sample["inputs"]], data_samples=[sample["data_samples"]]))[0]
    got = inference_detector(loaded, image.numpy())
    assert len(want.pred_instances) > 0
    assert torch.equal(want.pred_instances.scores, got.pred_instances.scores)
    assert torch.equal(want.pred_instances.bboxes, got.pred_instances.bboxes)


def listed():
    return [model for path in METAFILES for model in yaml.safe_load(path.read_text())["Models"]]


def test_model_index_imports_the_metafiles():
    imported = yaml.safe_load((ROOT / "model-index.yml").read_text())["Import"]
    assert sorted(imported) == sorted(str(path.relative_to(ROOT)) for path in METAFILES)


def test_metafiles_list_every_config_once():
    published = [path for path in MODEL_CONFIGS if path.parent.name not in WITHOUT_COCO_WEIGHTS]
    shipped = [str(path.relative_to(ROOT)) for path in published]
    assert sorted(model["Config"] for model in listed()) == sorted(shipped)
    assert [model["Name"] for model in listed()] == [model["Config"].split("/")[-1][:-3] for model in listed()]


@pytest.mark.parametrize("path", METAFILES, ids=lambda path: path.parent.name)
def test_collections(path):
    content = yaml.safe_load(path.read_text())
    (collection,) = content["Collections"]
    assert {model["In Collection"] for model in content["Models"]} == {collection["Name"]}
    assert set(collection["Paper"]) == {"Title", "URL"}
    assert (ROOT / collection["README"]).is_file()


def test_quantized_rows_point_at_their_float_row_and_claim_no_result():
    rows = {model["Name"]: model for model in listed()}
    for name, row in rows.items():
        named = QUANTIZED.fullmatch(name)
        if named is None:
            continue
        quant = read(ROOT / row["Config"]).model.quant
        assert row["Metadata"] == {
            "Weight bits": quant.w_bits,
            "Activation bits": quant.a_bits,
            "Scope": quant.scope,
            "Recipe": quant.recipe,
            "Float model": named["float"],
        }
        assert not {"Results", "Weights"} & set(row)
        assert "Results" in rows[named["float"]]


def test_float_rows_of_mmdet_repeat_mmdet():
    metafile = Path(mmdet.__file__).parent / ".mim" / "configs" / "swin" / "metafile.yml"
    theirs = {model["Name"]: model for model in yaml.safe_load(metafile.read_text())["Models"]}
    ours = [model for model in listed() if model["Name"] in theirs]
    assert len(ours) == 3
    for model in ours:
        for key in ("Results", "Weights"):
            assert model[key] == theirs[model["Name"]][key]
        assert model["Metadata"]["Epochs"] == theirs[model["Name"]]["Metadata"]["Epochs"]


def test_float_rows_of_the_cascade_are_the_published_ones():
    published = json.loads((ROOT / "benchmarks" / "results" / "published_coco.json").read_text())["rows"]
    want = {row["detector"]: (row["bbox"], row["segm"]) for row in published if row["method"] == "float"}
    rows = {model["Name"].split("-p4")[0]: model for model in listed() if "Weights" in model}
    for detector in ("cascade-mask-rcnn_swin-t", "cascade-mask-rcnn_swin-s"):
        box, mask = (result["Metrics"] for result in rows[detector]["Results"])
        assert (box["box AP"], mask["mask AP"]) == want[detector]
        size = {"t": "tiny", "s": "small"}[detector[-1]]
        assert rows[detector]["Weights"].endswith(f"/cascade_mask_rcnn_swin_{size}_patch4_window7.pth")
