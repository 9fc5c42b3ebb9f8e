import subprocess
import sys

import pytest
import timm_models
import torch
import torch.nn.functional as F
from helpers import ROOT, short_grids
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config
from timm_models import timm

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import partition
from apq_mmdet.engine.quantized_config import load_recipe
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import float_only, packed_state_dict, quantized_layers
from apq_mmdet.models import QuantizedDetector, SimpleFeaturePyramid, TimmBackbone, detection_task

register_all_modules()
SIZES = [(64, 96), (75, 50)]  # the second is no multiple of a stride
SMALL = {
    "swin": dict(embed_dim=16, depths=(1, 1, 1, 2), num_heads=(2, 2, 2, 4)),
    "vit": dict(embed_dim=16, depth=2, num_heads=2),
    "deit": dict(embed_dim=16, depth=2, num_heads=2),
}
NAMES = {name: timm_models.MODELS[name]["model_name"] for name in SMALL}


def backbone(name, **settings):
    return TimmBackbone(NAMES[name], **{**SMALL[name], **settings}).eval()


# -- maps -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_swin_gives_the_features_of_timm(size):
    model = backbone("swin")
    reference = timm.create_model(features_only=True, **model.model_args).eval()
    state = {key.replace("layers.", "layers_"): value for key, value in model.model.state_dict().items()}
    reference.load_state_dict(state)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        maps = model(x)
        want = reference(F.pad(x, (0, -size[1] % 32, 0, -size[0] % 32)))
    assert [tuple(m.shape) for m in maps] == [
        (2, 16 * 2**i, *(-(-s // 32) * 8 // 2**i for s in size)) for i in range(4)
    ]
    assert all(torch.equal(a, b.permute(0, 3, 1, 2)) for a, b in zip(maps, want, strict=True))


@pytest.mark.parametrize("name", ["vit", "deit"])
@pytest.mark.parametrize("size", SIZES)
def test_vit_gives_the_tokens_of_its_last_block(name, size):
    model = backbone(name)
    reference = timm.create_model(**model.model_args).eval()
    reference.load_state_dict(model.model.state_dict(), strict=False)
    reference.norm = torch.nn.Identity()
    height, width = (-(-s // 16) for s in size)
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        (found,) = model(x)
        tokens = reference.forward_features(F.pad(x, (0, 16 * width - size[1], 0, 16 * height - size[0])))
    tokens = tokens[:, reference.num_prefix_tokens :]  # [2, h * w, C]
    assert found.shape == (2, 16, height, width)
    assert torch.equal(found.flatten(2).transpose(1, 2), tokens)


def test_chosen_maps():
    model = backbone("vit", depth=4, out_indices=(1, -2))
    assert len(model.model.blocks) == 3  # the last one has no say
    with torch.no_grad():
        assert [m.shape[1:] for m in model(torch.randn(1, 3, 32, 32))] == [(16, 2, 2)] * 2
    assert [m.shape[2] for m in backbone("swin", out_indices=(0, 2))(torch.randn(1, 3, 32, 32))] == [8, 2]


def test_the_last_stage_of_a_swin_shifts_its_windows():
    shifts = [block.shift_size for block in backbone("swin").model.layers[3].blocks]
    assert shifts == [(0, 0), (3, 3)]


# -- weights --------------------------------------------------------------------------------------------------


def test_mmengine_leaves_the_weights_that_timm_gave():
    model = backbone("vit")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_a_classifiers_checkpoint_is_read_for_training(name, tmp_path):
    path = tmp_path / "classifier.pth"
    model = backbone(name, checkpoint_path=str(path))  # a detector that is only tested needs no such file
    classifier = timm.create_model(**model.model_args)
    torch.save(classifier.state_dict(), path)
    model.init_weights()
    state = classifier.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.model.state_dict().items())


def test_pretrained_weights_are_asked_for_only_then(monkeypatch):
    asked = []
    create = timm.create_model

    def spy(*args, pretrained=False, **kwargs):
        asked.append(pretrained)
        return create(*args, **kwargs)

    monkeypatch.setattr(timm, "create_model", spy)
    model = backbone("vit", pretrained=True)
    assert asked == [False]
    model.init_weights()
    assert asked == [False, True]


# -- bad input ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            dict(model_name="vit_smal_patch16_224"),
            "no model 'vit_smal_patch16_224'; did you mean 'vit_small_patch16_224'",
        ),
        (dict(model_name="resnet18"), "'resnet18' is no Swin, ViT or DeiT, but of timm.models.resnet"),
        (dict(model_name=NAMES["vit"], depths=3), "'depths': 3.*unexpected keyword argument 'depths'"),
        (dict(model_name=NAMES["vit"], **SMALL["vit"], out_indices=(2,)), "index 2 is out of range"),
    ],
)
def test_bad_arguments(settings, message):
    with pytest.raises(BadInputError, match=message):
        TimmBackbone(**settings)


def test_without_timm_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInputError, match="pip install 'timm>="):
        TimmBackbone(NAMES["vit"])


def test_timm_is_imported_and_made_known_only_where_it_is_asked_for():
    code = (
        "import sys, apq_mmdet.models\n"
        "assert 'timm' not in sys.modules\n"
        "apq_mmdet.models.TimmBackbone('vit_tiny_patch16_224', embed_dim=12, depth=1)\n"
        "from apq_mmdet.layers.convert import ATTENTION\n"
        "assert sys.modules['timm'].layers.Attention in ATTENTION"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


# -- neck -----------------------------------------------------------------------------------------------------


def test_pyramid():
    neck = SimpleFeaturePyramid(16, 8, num_outs=6)
    for parameter in neck.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 16, 5, 7)
    with torch.no_grad():
        maps = neck((x,))
        assert [tuple(m.shape[2:]) for m in maps] == [(20, 28), (10, 14), (5, 7), (3, 4), (2, 2), (1, 1)]
        assert all(m.shape[:2] == (2, 8) for m in maps)
        for index, size in ((2, x), (3, F.max_pool2d(F.pad(x, (0, 1, 0, 1), value=-1e9), 2))):
            first, norm, second, last = neck.convs[index]
            y = torch.einsum("oi,bihw->bohw", first.weight[:, :, 0, 0], size)
            y = F.conv2d(layer_norm(y, norm), second.weight, padding=1)
            assert torch.allclose(maps[index], layer_norm(y, last), atol=1e-5)
        assert torch.equal(maps[4], maps[3][:, :, ::2, ::2])


def test_the_finest_map_of_a_pyramid():
    """Small values, of which a norm's eps is a part that counts."""
    neck, x = SimpleFeaturePyramid(16, 8), 1e-3 * torch.randn(1, 16, 3, 4)
    first, norm, _, last = neck.resizers[0]
    with torch.no_grad():
        first.bias.zero_()
        y = F.conv_transpose2d(x, first.weight, stride=2)
        mean, variance = y.mean(1, keepdim=True), y.var(1, keepdim=True, unbiased=False)
        y = (y - mean) / (variance + 1e-6).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)
        y = y * (1 + torch.erf(y / 2**0.5)) / 2
        want = F.conv_transpose2d(y, last.weight, last.bias, stride=2)
        assert torch.allclose(neck.resizers[0](x), want, atol=1e-6)
    assert {part.eps for part in neck.modules() if isinstance(part, torch.nn.LayerNorm)} == {1e-6}


def layer_norm(x, norm):
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    return (x - mean) / (variance + norm.eps).sqrt() * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [(dict(in_channels=6), "multiple of 4, got 6"), (dict(in_channels=8, num_outs=3), "at least 4, got 3")],
)
def test_pyramids_that_do_not_fit(settings, message):
    with pytest.raises(BadInputError, match=message):
        SimpleFeaturePyramid(**settings)


# -- detectors ------------------------------------------------------------------------------------------------


def detector(name, quant):
    """The demo's Mask R-CNN with a small model of timm."""
    cfg = Config.fromfile(ROOT / "configs/demo/mask-rcnn_swin-demo_apq-w8a8.py")
    cfg.model.backbone = dict(type="apq_mmdet.TimmBackbone", model_name=NAMES[name], **SMALL[name])
    if name == "swin":
        cfg.model.neck.in_channels = [16, 32, 64, 128]
    else:
        cfg.model.neck = dict(type="apq_mmdet.SimpleFeaturePyramid", in_channels=16, out_channels=64)
    cfg.model.quant = quant
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    return model.eval()


def sample(height, width):
    meta = dict(img_shape=(height, width), ori_shape=(height, width), scale_factor=(1.0, 1.0), img_id=0)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    return dict(inputs=image, data_samples=DetDataSample(metainfo=meta))


def predictions(model, data):
    with torch.no_grad():
        return [
            model.test_step(dict(inputs=[d["inputs"]], data_samples=[d["data_samples"].clone()]))[0].pred_instances
            for d in data
        ]


@pytest.mark.parametrize(
    ("name", "method", "scope"),
    [("swin", "apq_plus", "backbone"), ("vit", "apq_plus", "backbone"), ("vit", "minmax", "detector")],
)
def test_a_detector_calibrated_saved_and_loaded(name, method, scope):
    quant = load_recipe(method) | dict(scope=scope, w_bits=4, a_bits=4)
    if "search" in quant:
        quant["search"]["grids"] = short_grids(2)
    model = detector(name, quant)
    data = [sample(*size) for size in SIZES]
    with float_only(model):
        want = predictions(model, data)
    report = calibrate(model, data, model.recipe, detection_task(model))
    if "search" in quant:
        searched = {f"{b.block}.{f}" for b in report.blocks for f in b.factors}
        assert searched == {f"{n}.{role}" for n, layer in quantized_layers(model) for role in layer.quantizers}
    loaded = detector(name, quant)
    loaded.load_state_dict(packed_state_dict(model))
    for got, same, exact in zip(predictions(model, data), predictions(loaded, data), want, strict=True):
        assert len(exact) > 0
        assert torch.equal(got.bboxes, same.bboxes)
        assert torch.equal(got.masks, same.masks)
        assert not torch.equal(got.scores[:1], exact.scores[:1])


def test_the_pyramid_is_one_block_of_calibration():
    blocks = partition(detector("vit", load_recipe("minmax") | dict(scope="detector")))
    assert isinstance(blocks["neck"], SimpleFeaturePyramid)
    assert len(list(quantized_layers(blocks["neck"]))) == 4 * 2  # the recipe leaves transposed convolutions in float


@pytest.mark.parametrize("path", sorted((ROOT / "configs/timm").glob("*.py")), ids=lambda p: p.stem)
def test_shipped_configs_build(path):
    cfg = Config.fromfile(path)
    name = next(name for name in SMALL if f"timm-{name}" in path.stem)
    cfg.model.backbone.update(SMALL[name])
    cfg.model.neck.in_channels = [16, 32, 64, 128] if name == "swin" else 16
    model = MODELS.build(cfg.model)
    assert isinstance(model, QuantizedDetector) == ("apq-plus" in path.stem)
    if isinstance(model, QuantizedDetector):
        rows = {(row.layer, row.role): row for row in model.quantization_table}
        bits = 4 if "w4a4" in path.stem else 8
        assert rows["backbone.model.patch_embed.proj", "input"].bits == 8
        assert {row.bits for (_, role), row in rows.items() if role in ("weight", "attention")} == {bits}
