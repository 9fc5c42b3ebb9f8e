"""Multi-head attention in modules: the same numbers as torch's own, quantized parts, torch's state keys."""

import copy

import pytest
import torch
from helpers import recipe
from mmengine.runner.checkpoint import load_state_dict as mmengine_load
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.calibration.importance import FeatureTask
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model, quantized_layers
from apq_mmdet.layers.attention import ProductMultiheadAttention

BATCH, QUERIES, KEYS, CHANNELS, HEADS = 2, 5, 7, 12, 3
PARTS = ("q_proj", "k_proj", "v_proj", "out_proj", "query_key", "attention_value")


def attention(**settings):
    """In eval mode, with random biases and without dropout unless asked for."""
    module = nn.MultiheadAttention(CHANNELS, HEADS, **settings).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def quantized(module, **settings):
    module = copy.deepcopy(module)
    quantize_model(module, recipe("minmax", **settings).policy)
    return module


def operands(batch_first=False, kdim=CHANNELS, vdim=CHANNELS, batched=True):
    tensors = [
        torch.randn(BATCH, n, c, dtype=torch.float64) for n, c in ((QUERIES, CHANNELS), (KEYS, kdim), (KEYS, vdim))
    ]
    if not batched:
        return [t[0] for t in tensors]
    return tensors if batch_first else [t.transpose(0, 1) for t in tensors]


def some(*shape):
    """A bool mask that leaves each query its first key."""
    mask = torch.rand(*shape) < 0.4
    mask[..., 0] = False
    return mask


MASKS = {
    "none": dict(),
    "bool": dict(attn_mask=some(QUERIES, KEYS)),
    "float": dict(attn_mask=torch.randn(QUERIES, KEYS, dtype=torch.float64)),
    "per head": dict(attn_mask=some(BATCH * HEADS, QUERIES, KEYS)),
    "padding": dict(key_padding_mask=some(BATCH, KEYS)),
    "both": dict(attn_mask=some(QUERIES, KEYS), key_padding_mask=some(BATCH, KEYS)),
    "float both": dict(
        attn_mask=torch.randn(BATCH * HEADS, QUERIES, KEYS, dtype=torch.float64),
        key_padding_mask=torch.randn(BATCH, KEYS, dtype=torch.float64),
    ),
    "causal": dict(attn_mask=torch.ones(QUERIES, KEYS, dtype=torch.bool).triu(1), is_causal=True),
}


def assert_same(want, got):
    for w, g in zip(want, got, strict=True):
        assert (w is None) == (g is None)
        if w is not None:
            torch.testing.assert_close(g, w, rtol=0, atol=1e-12)


def check(module, inputs, **call):
    """The module in modules against the module itself."""
    other = quantized(module)
    assert type(other) is ProductMultiheadAttention
    with torch.no_grad(), float_only(other):
        assert_same(module(*inputs, **call), other(*inputs, **call))


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
def test_masks(masks, batch_first):
    check(attention(batch_first=batch_first), operands(batch_first), **masks)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(
    "settings", [dict(), dict(bias=False), dict(kdim=5), dict(kdim=5, vdim=8), dict(vdim=8)], ids=str
)
def test_cross_attention_with_keys_and_values_of_other_sizes(settings, batch_first):
    sizes = {key: value for key, value in settings.items() if key != "bias"}
    check(attention(batch_first=batch_first, **settings), operands(batch_first, **sizes))


def test_self_attention():
    x, _, _ = operands(batch_first=True)
    check(attention(batch_first=True), (x, x, x))


@pytest.mark.parametrize("call", [dict(need_weights=False), dict(average_attn_weights=False)], ids=str)
@pytest.mark.parametrize("batched", [False, True])
def test_what_is_returned_of_the_attention_map(call, batched):
    check(attention(), operands(batched=batched), **call)


def test_without_a_batch():
    masks = dict(attn_mask=some(HEADS, QUERIES, KEYS), key_padding_mask=some(KEYS))
    check(attention(batch_first=True), operands(batched=False), **masks)


def test_dropout_in_training():
    module = attention(dropout=0.5).train()
    other = quantized(module)
    with torch.no_grad(), float_only(other):
        first, second = other(*operands())[1], module(*operands())[1]
    assert (first == 0).any()
    assert (second == 0).any()


def test_gradients():
    module, inputs = attention(), [t.requires_grad_() for t in operands()]
    other = quantized(module)
    with float_only(other):
        wants, gots = (torch.autograd.grad(m(*inputs)[0].square().sum(), inputs) for m in (module, other))
    assert_same(wants, gots)


def test_a_causal_hint_needs_its_mask():
    with pytest.raises(RuntimeError, match="is_causal needs an attn_mask"):
        quantized(attention())(*operands(), is_causal=True)


def test_every_part_is_quantized():
    module = attention(kdim=5)
    table = quantize_model(module, recipe("minmax").policy)
    rows = {(row.layer, row.role): row for row in table}
    assert dict.fromkeys(layer for layer, _ in rows) == dict.fromkeys(PARTS)
    assert {role for layer, role in rows if layer == "query_key"} == {"query", "key"}
    assert {role for layer, role in rows if layer == "attention_value"} == {"attention", "value"}
    assert all(row.bits == 4 for row in table)
    assert rows["query_key", "key"].groups == HEADS
    assert rows["attention_value", "attention"].format.startswith("matthew")
    assert rows["k_proj", "weight"].elements == 5 * CHANNELS


@pytest.mark.parametrize("settings", [dict(add_bias_kv=True), dict(add_zero_attn=True)], ids=str)
def test_learned_or_zero_keys_leave_it_float_and_listed(settings):
    model = nn.Sequential(nn.Linear(2, 2), attention(**settings).float())
    rows = {row.layer: row for row in quantize_model(model, recipe("minmax").policy)}
    assert type(model[1]) is nn.MultiheadAttention
    assert "add_bias_kv" in rows["1"].reason
    assert rows["1"].elements == 3 * CHANNELS**2
    assert "without calling it" in rows["1.out_proj"].reason


def test_outside_the_scope_it_is_listed():
    model = nn.Module()
    model.backbone, model.head = nn.Linear(2, 2), attention()
    rows = {row.layer: row for row in quantize_model(model, recipe("minmax").policy)}
    assert rows["head"].reason == "outside scope 'backbone'"


class SelfAttention(nn.Module):
    """An attention that takes one tensor, with a float layer around it."""

    def __init__(self, **settings):
        super().__init__()
        self.attn = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True, **settings)

    def forward(self, x):
        return self.attn(x, x, x)[0]


LOADERS = {
    "torch": lambda model, state: model.load_state_dict(state),
    "mmengine": lambda model, state: mmengine_load(model, type(model.state_dict())(state), strict=True),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("settings", [dict(), dict(bias=False), dict(kdim=12, vdim=5)], ids=str)
def test_float_keys_are_torchs_and_float_weights_load(load, settings):
    module = nn.Sequential(nn.Identity(), attention(**settings).float())
    wanted = module.state_dict()
    other = nn.Sequential(nn.Identity(), attention(**settings).float())
    quantize_model(other, recipe("minmax").policy)
    load(other, wanted)
    state = {k: v for k, v in other.state_dict().items() if "quantizers" not in k and "version" not in k}
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
@pytest.mark.parametrize("name", ["minmax", "apq_plus"])
def test_calibrated_packed_and_loaded_again(load, name):
    settings = recipe(name)
    model = SelfAttention()
    quantize_model(model, settings.policy)
    calibrate(model, [torch.randn(1, 9, CHANNELS)], settings, FeatureTask())
    state = packed_state_dict(model)
    for part in PARTS[:4]:
        assert state[f"attn.{part}.weight_codes"].numel() == CHANNELS**2 // 2
    assert not any("in_proj" in key or key.endswith(".weight") for key in state)
    other = SelfAttention()
    quantize_model(other, settings.policy)
    load(other, state)
    x = torch.randn(1, 6, CHANNELS)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))
        with float_only(model):
            assert not torch.equal(model(x), other(x))


def test_quantization_counts_in_every_part():
    model = SelfAttention()
    quantize_model(model, recipe("minmax").policy)
    calibrate(model, [torch.randn(1, 9, CHANNELS)], recipe("minmax"), FeatureTask())
    x = torch.randn(1, 6, CHANNELS)
    with torch.no_grad():
        wanted = model(x)
        for _, layer in quantized_layers(model):
            for quantizer in layer.quantizers.values():
                with float_only(quantizer):
                    assert not torch.equal(model(x), wanted)


def test_its_own_state_dict_loads_again():
    """Which has torch's names of the projections, unlike a packed one."""
    settings = recipe("minmax")
    model, other = SelfAttention(), SelfAttention()
    for made in (model, other):
        quantize_model(made, settings.policy)
    calibrate(model, [torch.randn(1, 9, CHANNELS)], settings, FeatureTask())
    state = model.state_dict()
    assert "attn.in_proj_weight" in state
    other.load_state_dict(state)
    x = torch.randn(1, 6, CHANNELS)
    with torch.no_grad():
        assert torch.equal(model(x), other(x))


def test_a_padded_sequence_goes_through_an_encoder():
    """torch packs it into a nested tensor for a kernel that the modules replace."""
    layer = nn.TransformerEncoderLayer(CHANNELS, 2, 16, batch_first=True)  # an odd number of heads is not packed
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    x, padding = torch.randn(BATCH, KEYS, CHANNELS, dtype=torch.float64), torch.zeros(BATCH, KEYS, dtype=torch.bool)
    padding[1, 5:] = True
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        module = quantized(encoder)
        with float_only(module):
            found = module(x, src_key_padding_mask=padding)
    assert torch.allclose(found[~padding], expected[~padding], rtol=1e-10, atol=1e-10)
