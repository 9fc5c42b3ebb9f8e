import copy
from functools import partial

import pytest
import timm
import timm_models
import torch
from helpers import recipe, short_grids
from timm.layers import Attention, GluMlp, PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.vision_transformer import Block
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.blocks import BlockCall, partition
from apq_mmdet.calibration.sampling import sample_call
from apq_mmdet.calibration.transforms import rescalings_of
from apq_mmdet.calibration.units import rows_of, to_units, unit_module
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model, quantized_layers
from apq_mmdet.layers.convert import ATTENTION

IMAGES = [torch.randn(1, 3, 64, 80), torch.randn(1, 3, 48, 32)]  # whole patches of both kinds of models
SHAPES = [(13, 9), (7, 14), (9, 9), (5, 3)]  # of token grids; all but the second are padded to windows


def with_products(attention):
    product = copy.deepcopy(attention)
    ATTENTION[type(attention)](product)
    return product


def random_(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


# -- attention --------------------------------------------------------------------------------------------------


UNCALLED = {
    "beit_base_patch16_224": dict(img_size=32, embed_dim=16, depth=1, num_heads=2),
    "swinv2_tiny_window8_256": dict(img_size=32, window_size=4, embed_dim=8, depths=(1, 1), num_heads=(1, 2)),
    "eva02_tiny_patch14_224": dict(img_size=28, embed_dim=16, depth=1, num_heads=2),
}


@pytest.mark.parametrize("name", UNCALLED)
def test_projections_that_are_not_called_are_said_to_stay_float(name):
    """No data would reach their quantizers, and no codes the product."""
    model = timm.create_model(name, **UNCALLED[name]).eval()
    image, settings = torch.randn(1, 3, *model.patch_embed.img_size), recipe("minmax")
    expected = model(image)
    rows = {row.layer: row for row in quantize_model(model, settings.policy) if row.layer.endswith("qkv")}
    assert rows
    assert {row.reason for row in rows.values()} == {"its attention uses the weight without calling it"}
    with float_only(model):
        assert torch.equal(model(image), expected)
    assert calibrate(model, [image], settings).left_float == []


@pytest.mark.parametrize("windows", [None, 3], ids=["plain", "masked"])
def test_window_attention_is_timms(windows):
    attention = random_(WindowAttention(16, 2, head_dim=4, window_size=(3, 2)))
    attention.fused_attn = True  # the reference is torch's fused kernel
    product = with_products(attention)
    x = torch.randn(6, 6, 16).double()
    mask = None if windows is None else -100.0 * (torch.rand(windows, 6, 6) > 0.6).double()
    assert torch.allclose(product(x, mask), attention(x, mask), rtol=1e-12, atol=1e-12)
    assert list(product.state_dict()) == list(attention.state_dict())


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({}, dict(attn_mask=torch.randn(1, 1, 5, 5).double())),
        ({}, dict(attn_mask=torch.rand(5, 5) > torch.eye(5) - 0.6)),
        ({}, dict(is_causal=True)),
        (dict(qk_norm=True, norm_layer=nn.LayerNorm), {}),
        (dict(scale_norm=True, norm_layer=nn.LayerNorm), {}),
        (dict(gated=True, attn_head_dim=4, dim_out=12), {}),
    ],
    ids=["plain", "float mask", "bool mask", "causal", "qk_norm", "scale_norm", "gated"],
)
def test_attention_is_timms(options, call):
    attention = random_(Attention(16, 2, qkv_bias=True, **options))
    attention.fused_attn = True
    product = with_products(attention)
    x = torch.randn(2, 5, 16).double()
    assert torch.allclose(product(x, **call), attention(x, **call), rtol=1e-12, atol=1e-12)
    assert list(product.state_dict()) == list(attention.state_dict())


# -- whole models -------------------------------------------------------------------------------------------------


def quantized(name, settings):
    torch.manual_seed(3)
    model = timm_models.build(name)
    quantize_model(model, settings.policy)
    return model


def features(model, x):
    with torch.no_grad():
        return model.forward_intermediates(x, intermediates_only=True)


@pytest.mark.parametrize("name", timm_models.MODELS)
def test_float_function_of_a_quantized_model(name):
    torch.manual_seed(3)
    model = timm_models.build(name)
    want = [features(model, x) for x in IMAGES]
    model = quantized(name, recipe("minmax"))
    with float_only(model):
        got = [features(model, x) for x in IMAGES]
    for maps, same in zip(got, want, strict=True):
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-5) for a, b in zip(maps, same, strict=True))


@pytest.mark.parametrize("name", timm_models.MODELS)
def test_every_product_is_quantized(name):
    model = quantized(name, recipe("apq"))
    rows = {(row.layer, row.role): row for row in model.quantization_table}
    modules = dict(model.named_modules())
    expected = {}
    for n, module in modules.items():
        if isinstance(module, nn.Linear):
            expected |= {(n, "weight"): "3" if n.endswith("qkv") else "tensor", (n, "input"): "tensor"}
        elif isinstance(module, nn.Conv2d):
            expected |= {(n, "weight"): "channel", (n, "input"): "tensor"}
        elif isinstance(module, (WindowAttention, Attention)):
            expected |= {(f"{n}.query_key", role): "head" for role in ("query", "key")}
            expected |= {(f"{n}.attention_value", role): "head" for role in ("attention", "value")}
    assert {key: row.granularity for key, row in rows.items() if row.bits} == expected
    assert {row.kind for row in rows.values() if not row.bits} == {"LayerNorm"}
    groups = {row.groups for (layer, _), row in rows.items() if "query_key" in layer}
    assert groups == ({2, 4} if name == "swin" else {2})


@pytest.mark.parametrize("name", timm_models.MODELS)
def test_blocks_of_calibration(name):
    blocks = {type(block) for block in partition(quantized(name, recipe("minmax"))).values()}
    assert blocks == ({PatchEmbed, SwinTransformerBlock, PatchMerging} if name == "swin" else {PatchEmbed, Block})


def shortened(name):
    search = dict(grids=short_grids(3), rounds=1)
    return recipe(name, search=search)


@pytest.mark.parametrize("method", ["apq", "apq_plus", "apq_fast", "qwt"])
@pytest.mark.parametrize("name", ["swin", "vit"])
def test_calibrated_saved_and_loaded(name, method):
    settings = shortened(method)
    model = quantized(name, settings)
    with float_only(model):
        want = features(model, IMAGES[0])
    report = calibrate(model, IMAGES, settings)
    searched = {f"{b.block}.{f}" for b in report.blocks for f in b.factors}
    assert searched == {f"{n}.{role}" for n, layer in quantized_layers(model) for role in layer.quantizers}
    loaded = quantized(name, settings)
    loaded.load_state_dict(packed_state_dict(model), strict=True)
    for got, same, exact in zip(features(model, IMAGES[0]), features(loaded, IMAGES[0]), want, strict=True):
        assert torch.equal(got, same)
        assert 0 < float((got - exact).norm() / exact.norm()) < 1


def test_attention_of_other_kinds_is_said_to_stay_float():
    model = timm_models.build("vit", attn_layer="diff")
    rows = {row.layer: row for row in quantize_model(model, recipe("minmax").policy) if not row.bits}
    assert rows["blocks.0.attn"].kind == "DiffAttention"
    assert "product" in rows["blocks.0.attn"].reason


# -- rescalings -----------------------------------------------------------------------------------------------------


def blocks_of(model, cls):
    return [m for m in model.modules() if isinstance(m, cls)]


def swin_block(index):
    return blocks_of(timm_models.build("swin").double(), SwinTransformerBlock)[index]


def vit_block(gated=False, **options):
    block = Block(16, 2, qkv_bias=True, **options)
    if gated:
        block.attn = Attention(16, 2, qkv_bias=True, gated=True)
    return random_(block)


ALL = ["norm1", "query_key", "value_proj", "norm2"]


@pytest.mark.parametrize(
    ("make", "places"),
    [
        (partial(swin_block, 0), ALL),
        (partial(swin_block, 1), ALL),
        (vit_block, ALL),
        (partial(vit_block, init_values=0.1), ALL),
        (partial(vit_block, qk_norm=True), ["norm1", "value_proj", "norm2"]),
        (partial(vit_block, scale_attn_norm=True), ["norm1", "query_key", "norm2"]),
        (partial(vit_block, gated=True), ["query_key", "value_proj", "norm2"]),
        (partial(vit_block, mlp_layer=GluMlp), ["norm1", "query_key", "value_proj"]),
    ],
    ids=["swin", "shifted", "vit", "layer scale", "qk_norm", "scale_norm", "gated", "GLU"],
)
def test_rescalings_keep_the_function(make, places):
    block = make()
    rescalings = rescalings_of(block)
    assert [r.name for r in rescalings] == places
    shapes = SHAPES if isinstance(block, SwinTransformerBlock) else [(5,)]
    inputs = [torch.randn(1, *shape, 16).double() for shape in shapes]
    with torch.no_grad():
        for rescaling in rescalings:
            want = [block(x) for x in inputs]
            before = [p.clone() for p in block.parameters()]
            rescaling.divide(torch.randn(16).exp())
            for x, output in zip(inputs, want, strict=True):
                assert torch.allclose(block(x), output, rtol=1e-9, atol=1e-9)
            assert sum(not torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True)) >= 2


def test_patch_merging_keeps_its_function():
    (block,) = blocks_of(timm_models.build("swin").double(), PatchMerging)
    (rescaling,) = rescalings_of(block)
    x = torch.randn(1, 13, 9, 16).double()
    with torch.no_grad():
        want = block(x)
        rescaling.divide(torch.randn(64).exp())
        assert torch.allclose(block(x), want, rtol=1e-9, atol=1e-9)


def test_subclasses_are_left_alone():
    class OtherBlock(Block):
        def forward(self, x):
            return super().forward(x)

    class OtherAttention(Attention):
        def forward(self, x, **masks):
            return super().forward(x, **masks)

    assert rescalings_of(OtherBlock(16, 2)) == []
    assert [r.name for r in rescalings_of(Block(16, 2, attn_layer=OtherAttention))] == ["norm2"]


# -- units and samples ----------------------------------------------------------------------------------------------


def block_call(block, x):
    with torch.no_grad():
        output = block(x)
    return BlockCall((x,), {}, [output], [torch.randn_like(output)], 0)


@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("images", [1, 2])
def test_windows_give_the_output_of_the_block(index, shape, images):
    block = swin_block(index)
    call = block_call(block, torch.randn(images, *shape, 16).double())
    view, units = unit_module(block), to_units(block, call)
    with torch.no_grad():
        got = rows_of([view(*units.args)], len(units.targets))
    assert torch.allclose(got, units.targets, rtol=1e-9, atol=1e-9)
    assert len(units.targets) == images * -(-shape[0] // 7) * -(-shape[1] // 7)
    assert units.elements == call.outputs[0].numel() == units.targets.numel() - int(units.padding.sum())
    assert float(units.grads.square().sum()) == pytest.approx(float(call.grads[0].square().sum()))


def test_the_mask_of_shifted_windows_matters():
    block = swin_block(1)
    view, units = unit_module(block), to_units(block, block_call(block, torch.randn(1, 14, 14, 16).double()))
    x, region, valid = units.args
    assert len(region.unique()) == 9
    with torch.no_grad():
        together = rows_of([view(x, torch.zeros_like(region), valid)], len(units.targets))
    assert not torch.allclose(together, units.targets, atol=1e-3)


@pytest.mark.parametrize(
    ("block", "x", "units"),
    [
        (PatchMerging(8), torch.randn(2, 13, 9, 8), 2 * 7 * 5),
        (PatchEmbed(None, 4, 3, 8, nn.LayerNorm, output_fmt="NHWC"), torch.randn(1, 3, 32, 40), 8 * 10),
        (PatchEmbed(None, 4, 3, 8, dynamic_img_pad=True), torch.randn(2, 3, 33, 42), 2 * 9 * 11),
        (PatchEmbed(None, 4, 3, 8, output_fmt="NCHW"), torch.randn(1, 3, 32, 40), 1),
    ],
    ids=["merging", "NHWC", "padded", "NCHW"],
)
def test_patches_give_the_output_of_the_block(block, x, units):
    view, call = unit_module(block), to_units(block, block_call(block, x))
    with torch.no_grad():
        got = rows_of([view(*call.args)], len(call.targets))
    assert torch.allclose(got, call.targets, atol=1e-5)
    assert len(call.targets) == units


def test_an_embedding_on_a_range_of_its_image_is_not_taken_apart():
    block = PatchEmbed(None, 4, 3, 8, nn.LayerNorm, output_fmt="NHWC")
    quantize_model(block, recipe("apq", overrides=dict(mine=dict(input=dict(format="dynamic_affine")))).policy)
    with float_only(block):
        call = to_units(block, block_call(block, torch.randn(1, 3, 32, 40)))
    assert not call.separable


def test_a_sample_is_a_crop_of_whole_windows():
    search = recipe("apq_fast", search=dict(windows=1)).search
    block = swin_block(1)
    call = block_call(block, torch.arange(14 * 21).view(1, 14, 21, 1).expand(-1, -1, -1, 16).double())
    starts = set()
    for seed in range(6):
        sample = sample_call(block, call, search, seed)
        (x,) = sample.args
        row, column = divmod(int(x[0, 0, 0, 0]), 21)
        starts.add((row, column))
        assert torch.equal(x, call.args[0][:, row : row + 7, column : column + 7])
        assert torch.equal(sample.grads[0], call.grads[0][:, row : row + 7, column : column + 7])
        with torch.no_grad():
            assert torch.equal(sample.outputs[0], block(x))
    assert len(starts) > 2
    assert all(row % 7 == column % 7 == 0 for row, column in starts)
    small = block_call(block, torch.randn(1, 5, 7, 16).double())
    assert sample_call(block, small, search, seed=0) is small


def test_a_block_that_masks_for_one_size_is_not_sampled():
    block = blocks_of(timm_models.build("swin", img_size=112, dynamic_img_size=False), SwinTransformerBlock)[1]
    call = block_call(block, torch.randn(1, 28, 28, 16))
    assert sample_call(block, call, recipe("apq_fast", search=dict(windows=1)).search, 0) is call
