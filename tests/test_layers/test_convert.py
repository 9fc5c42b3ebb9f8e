import copy

import pytest
import torch
from helpers import build_swin, recipe
from mmengine.model import NormalInit
from torch import nn
from torch.nn.utils import parametrizations

from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import float_only, quantize_model, quantized_layers
from apq_mmdet.policy import Policy


class EveryLayer(nn.Module):
    """One layer of each kind, in a chain."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, groups=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, output_padding=1)
        self.norm = nn.LayerNorm(4)
        self.fc = nn.Linear(4, 5)

    def forward(self, x):
        x = self.up(self.depthwise(self.conv(x)))
        return self.fc(self.norm(x.movedim(1, -1)))


@pytest.mark.parametrize(("model", "shape"), [(EveryLayer(), (2, 3, 9, 7)), (build_swin(2, 2), (1, 3, 61, 45))])
def test_with_quantization_off_the_float_function_is_untouched(model, shape):
    x = torch.randn(shape)
    model.eval()
    quantized = copy.deepcopy(model)
    quantize_model(quantized, recipe("apq").policy)
    with torch.no_grad(), float_only(quantized):
        want, got = model(x), quantized(x)
    want, got = (list(v) if isinstance(v, tuple | list) else [v] for v in (want, got))
    assert all(torch.equal(w, g) for w, g in zip(want, got, strict=True))


def test_float_keys_are_kept_and_float_weights_load(swin):
    quantized = copy.deepcopy(swin)
    quantize_model(quantized, recipe("apq").policy)
    assert [k for k in quantized.state_dict() if "quantizers" not in k and "version" not in k] == list(
        swin.state_dict()
    )
    assert not any(quantized.load_state_dict(swin.state_dict()))


def test_table_names_every_layer_with_bits_or_a_reason():
    model = EveryLayer()
    table = quantize_model(model, recipe("apq").policy)
    rows = {(row.layer, row.role): row for row in table}
    assert rows["conv", "weight"].bits == 4
    assert rows["conv", "weight"].groups == 8
    assert rows["fc", "weight"].groups == 1
    assert rows["up", "weight"].bits is None
    assert "ConvTranspose2d" not in {type(m).__name__ for _, m in quantized_layers(model)}
    assert rows["norm", "-"].reason.startswith("normalisation")
    assert all(bool(row.bits) != bool(row.reason) for row in table)
    assert {row.layer for row in table} == {"conv", "depthwise", "up", "norm", "fc"}


def test_swin_table(swin):
    rows = {(r.layer, r.role): r for r in quantize_model(swin, recipe("apq").policy)}
    prefix = "stages.0.blocks.1.attn.w_msa"
    assert rows[f"{prefix}.qkv", "weight"].groups == 3
    assert rows[f"{prefix}.attention_value", "attention"].format.startswith("matthew")
    assert rows[f"{prefix}.query_key", "query"].groups == 2
    assert rows["patch_embed.projection", "input"].bits == 8
    assert rows["patch_embed.projection", "weight"].bits == 4


def test_transposed_convolution_as_an_option():
    model = EveryLayer()
    override = dict(kind="ConvTranspose2d", weight=dict(granularity="channel"), input={})
    table = quantize_model(model, recipe("apq", overrides=dict(deconv=override)).policy)
    row = next(r for r in table if (r.layer, r.role) == ("up", "weight"))
    assert (row.bits, row.groups) == (4, 4)
    assert next(r for r in table if (r.layer, r.role) == ("up", "input")).bits == 4


def test_scope_backbone_leaves_the_rest():
    model = nn.Module()
    model.backbone, model.head = nn.Linear(2, 2), nn.Linear(2, 2)
    table = quantize_model(model, Policy(4, 4))
    assert [name for name, _ in quantized_layers(model)] == ["backbone"]
    assert next(r for r in table if r.layer == "head").reason == "outside scope 'backbone'"


def test_a_subclass_with_its_own_forward_stays_float():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(2, 2), nn.Linear(2, 2))
    table = quantize_model(model, Policy(4, 4))
    assert [name for name, _ in quantized_layers(model)] == ["1"]
    assert table[0].reason == "Scaled has no quantized form"


@pytest.mark.parametrize(
    "rule",
    [
        dict(weight=dict(granularity="head")),
        dict(input=dict(granularity="head")),
        dict(weight=dict(granularity=7)),
        dict(weight=dict(granularity=0)),
        dict(weight=dict(granularity=True)),
    ],
)
def test_impossible_granularity_is_refused(rule):
    with pytest.raises(BadInputError, match=r"layer 'fc'.*granularity"):
        quantize_model(EveryLayer(), Policy.from_dict(dict(overrides=dict(r=dict(pattern="fc", **rule)))))


def test_a_model_without_layers_is_refused():
    with pytest.raises(BadInputError, match="no layer"):
        quantize_model(nn.LayerNorm(3), Policy())


def test_formats_without_linear_codes_are_refused_for_weights():
    rule = dict(pattern="fc", weight=dict(format="twin_gelu"))
    with pytest.raises(BadInputError, match=r"layer 'fc'.*'twin_gelu'.*'weight'.*'affine'"):
        quantize_model(EveryLayer(), Policy.from_dict(dict(overrides=dict(r=rule))))


def test_quantizers_are_where_their_layers_are():
    model = build_swin().to("meta")
    quantize_model(model, recipe("qwt").policy)
    assert {value.device.type for value in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("qwt", dict(pattern="*.qvk", bits=8), "matches no layer"),
        ("apq", dict(pattern="*blocks.1*.qkv", weight=dict(granularity=5)), "granularity 5 does not fit"),
    ],
)
def test_no_layer_of_a_refused_model_is_quantized(name, override, message):
    """The last of its layers was refused once, when the others had been converted."""
    model, untouched = build_swin(), build_swin()
    with pytest.raises(BadInputError, match=message):
        quantize_model(model, recipe(name, overrides=dict(mine=override)).policy)
    assert list(quantized_layers(model)) == []
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert not any(module._forward_hooks for module in model.modules())
    rows = quantize_model(model, recipe("apq", w_bits=3).policy)
    assert {row.bits for row in rows if row.role == "weight" and row.bits} == {3}


def test_a_quantized_model_is_refused():
    model = build_swin()
    quantize_model(model, recipe("apq").policy)
    with pytest.raises(BadInputError, match="SwinTransformer holds quantized layers already"):
        quantize_model(model, recipe("minmax").policy)


@pytest.mark.parametrize(
    ("reparametrize", "elements"),
    [
        (nn.utils.weight_norm, 16 + 4),  # the length of each row, too
        (nn.utils.spectral_norm, 16),
        (parametrizations.weight_norm, 16 + 4),
        (parametrizations.spectral_norm, 16),
    ],
)
def test_weights_that_are_computed_stay_float(reparametrize, elements):
    model = nn.Sequential(reparametrize(nn.Linear(4, 4)), nn.Linear(4, 4))
    table = {row.layer: row for row in quantize_model(model, recipe("minmax").policy) if row.role in ("-", "weight")}
    assert (table["0"].bits, table["0"].reason) == (None, "its weight is computed in every forward")
    assert table["0"].elements == elements
    assert table["1"].bits == 4


def test_quantizers_are_modules_by_name_that_initialisers_pass_over():
    model = nn.Sequential(nn.Linear(4, 4))
    quantize_model(model, recipe("minmax").policy)
    assert model.get_submodule("0.quantizers.weight") is model[0].quantizers["weight"]
    assert all(model.get_buffer(name) is buffer for name, buffer in model.named_buffers())
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    NormalInit(std=0.1)(model)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    x = torch.randn(2, 4)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with float_only(model):
        assert torch.equal(torch.func.functional_call(model, tensors, (x,)), model(x))


def test_a_model_without_storage_can_be_printed():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    quantize_model(model, recipe("minmax", w_bits=3).policy)
    assert "bits=3, asymmetric" in repr(model)
