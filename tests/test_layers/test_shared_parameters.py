"""Weights and biases that several modules hold: calibration would change them for all."""

import pytest
import torch
from helpers import recipe
from torch import nn

from apq_mmdet.calibration import calibrate
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import packed_state_dict, quantize_model, quantized_layers
from apq_mmdet.policy import Policy


@pytest.mark.parametrize(
    "rules",
    [
        dict(),
        dict(first=dict(pattern="0", float=True)),
        dict(both=dict(weight=None, input=dict(granularity="channel"))),
        dict(both=dict(weight=None), second=dict(pattern="1", input=dict(granularity="channel"))),
    ],
)
def test_one_weight_of_two_layers_is_not_quantized(rules):
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    with pytest.raises(BadInputError, match=r"layers '0' and '1' share one weight.*leave them float"):
        quantize_model(model, Policy.from_dict(dict(overrides=rules)))
    for layer in model:
        assert type(layer) is nn.Linear
    quantize_model(model, Policy.from_dict(dict(overrides=dict(both=dict(weight=None)))))  # inputs alone


class Tied(nn.Module):
    """The table of an embedding is the weight of the last layer; the embedding comes before it or behind it."""

    def __init__(self, embedding_first):
        super().__init__()
        if embedding_first:
            self.table = nn.Embedding(11, 6)
        self.mid, self.out = nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        if not embedding_first:
            self.table = nn.Embedding(11, 6)
        self.out.weight = self.table.weight

    def forward(self, x):
        return self.out(self.mid(self.table(x)).relu())


@pytest.mark.parametrize("name", ["minmax", "erq"])
@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_weight_that_is_a_table_too_is_not_quantized(name, embedding_first):
    model = Tied(embedding_first)
    with pytest.raises(BadInputError, match=r"(?=.*'table')(?=.*'out')") as caught:
        quantize_model(model, recipe(name).policy)
    assert "weight" in str(caught.value)
    assert not list(quantized_layers(model))


class HeadOnBackbone(nn.Module):
    """A head outside of what is quantized has the first weight of the backbone."""

    def __init__(self, head_first=False):
        super().__init__()
        backbone = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
        for name in ("head", "backbone") if head_first else ("backbone", "head"):
            setattr(self, name, backbone if name == "backbone" else nn.Linear(6, 6))
        self.head.weight = backbone[0].weight

    def forward(self, x):
        return self.head(self.backbone(x))


@pytest.mark.parametrize("head_first", [True, False])
def test_a_weight_that_a_layer_outside_of_the_scope_has_too_is_not_quantized(head_first):
    model = HeadOnBackbone(head_first)
    with pytest.raises(BadInputError, match=r"(?=.*'head')(?=.*'backbone\.0')"):
        quantize_model(model, Policy(4, 4))
    assert not list(quantized_layers(model))


@pytest.mark.parametrize(
    ("make", "shared", "held", "sample"),
    [
        (lambda: Tied(True), "out", "table", torch.arange(11)[None]),
        (HeadOnBackbone, "backbone.0", "head", torch.linspace(-2, 3, 48).view(8, 6)),
    ],
)
def test_a_layer_that_is_left_float_may_share_its_weight(make, shared, held, sample):
    settings = recipe("erq", overrides=dict(tied=dict(pattern=shared, float=True)))
    models = []
    for _ in range(2):
        torch.manual_seed(1)
        models.append(make().eval())
        quantize_model(models[-1], settings.policy)
    calibrated, loaded = models
    weight = calibrated.get_submodule(held).weight
    before = weight.detach().clone()
    calibrate(calibrated, [sample], settings)
    assert calibrated.get_submodule(shared).weight is weight
    assert torch.equal(weight, before)
    loaded.load_state_dict(packed_state_dict(calibrated))
    with torch.no_grad():
        assert torch.equal(calibrated(sample), loaded(sample))


@pytest.mark.parametrize("name", ["minmax", "erq"])
def test_one_bias_of_two_quantized_layers_is_refused(name):
    """Each would add to it what makes up for its own errors."""
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].bias = model[0].bias
    with pytest.raises(BadInputError, match=r"(?=.*'0')(?=.*'2').*bias"):
        quantize_model(model, recipe(name).policy)
    assert not list(quantized_layers(model))
    model = nn.Sequential(model, nn.Linear(6, 6))
    quantize_model(model, recipe(name, overrides=dict(both=dict(pattern="0.*", float=True))).policy)
    assert [layer for layer, _ in quantized_layers(model)] == ["1"]
