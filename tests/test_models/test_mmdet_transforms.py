import pytest
import torch
from helpers import build_swin, in_processes, process_group, recipe
from mmdet.models.backbones.swin import SwinBlock, WindowMSA
from mmdet.models.layers import PatchMerging
from torch import nn

from apq_mmdet.calibration.blocks import BlockCall, partition, tensors_of
from apq_mmdet.calibration.distributed import own_images
from apq_mmdet.calibration.store import TensorStore
from apq_mmdet.calibration.transforms import channel_extents, equalize, rescalings_of
from apq_mmdet.calibration.units import UnitCalls, to_units, unit_module
from apq_mmdet.layers import float_only, quantize_model, quantized_layers
from apq_mmdet.quantizers import QuantizerMode, quantizer_mode

SHAPES = [(13, 9), (7, 14), (5, 3)]  # the first and last are padded
IMAGES = 17  # three shards
RESCALED = {  # of a Swin block; what reads the GELU or is an attention map is not
    "attn.w_msa.qkv": {"input", "weight"},
    "attn.w_msa.query_key": {"query", "key"},
    "attn.w_msa.attention_value": {"value"},
    "attn.w_msa.proj": {"input", "weight"},
    "ffn.layers.0.0": {"input", "weight"},
}


@pytest.fixture
def double_swin():
    return build_swin(stages=2).double()


def blocks_of(model, cls):
    return [m for m in model.modules() if isinstance(m, cls)]


@pytest.mark.parametrize("place", ["norm1", "query_key", "value_proj", "norm2"])
@pytest.mark.parametrize("index", [0, 1], ids=["plain", "shifted"])
def test_swin_blocks_keep_their_function(double_swin, place, index):
    block = blocks_of(double_swin, SwinBlock)[index]
    calls = [(torch.randn(1, h * w, 8).double(), (h, w)) for h, w in SHAPES]
    (rescaling,) = [r for r in rescalings_of(block) if r.name == place]
    before = [p.clone() for p in block.parameters()]
    with torch.no_grad():
        want = [block(*call) for call in calls]
        rescaling.divide(torch.randn(8).exp())
        got = [block(*call) for call in calls]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got, want, strict=True))
    assert sum(not torch.equal(a, b) for a, b in zip(before, block.parameters(), strict=True)) >= 2


def test_patch_merging_keeps_its_function(double_swin):
    (block,) = blocks_of(double_swin, PatchMerging)
    (rescaling,) = rescalings_of(block)
    x = torch.randn(1, 13 * 9, 8).double()
    with torch.no_grad():
        want = block(x, (13, 9))[0]
        rescaling.divide(torch.randn(32).exp())
        assert torch.allclose(block(x, (13, 9))[0], want, rtol=1e-9, atol=1e-9)


def test_other_norms_and_subclasses_are_left_alone():
    block = blocks_of(build_swin(), SwinBlock)[0]
    block.norm2 = nn.Identity()
    assert [r.name for r in rescalings_of(block)] == ["norm1", "query_key", "value_proj"]

    class Other(SwinBlock):
        def forward(self, x, hw_shape):
            return super().forward(x, hw_shape)

    block.__class__ = Other
    assert rescalings_of(block) == []


def test_other_attention_and_other_ffns_are_left_alone():
    """They may use what is rescaled in a way that does not cancel: a cosine of queries and keys, a gate."""

    class Cosine(WindowMSA):
        def forward(self, x, mask=None):
            return x

    swin = build_swin()
    block, other = blocks_of(swin, SwinBlock)
    block.attn.w_msa.__class__ = Cosine
    other.ffn = nn.Sequential(nn.Linear(8, 8))
    assert [r.name for r in rescalings_of(block)] == ["norm2"]
    assert [r.name for r in rescalings_of(other)] == ["norm1", "query_key", "value_proj"]
    table = {row.layer: row for row in quantize_model(swin, recipe("minmax").policy)}
    own = table["stages.0.blocks.0.attn.w_msa"]
    assert (own.bits, own.reason) == (None, "a WindowMSA of another class: its products have no modules")
    assert "stages.0.blocks.1.attn.w_msa" not in table
    assert [r.name for r in rescalings_of(other)] == ["norm1", "query_key", "value_proj"]


def quantized_block(images=3, own=None):
    """A quantized block with uneven channels, its view and its calls with observed ranges."""
    torch.manual_seed(0)
    swin = build_swin()
    quantize_model(swin, recipe("minmax").policy)
    block = partition(swin)["stages.0.blocks.1"]
    for rescaling in rescalings_of(block):
        rescaling.divide(torch.randn(8).exp())
    calls = UnitCalls(TensorStore(memory=2**30), "block")
    for image in range(images):
        shape = SHAPES[image % len(SHAPES)]
        x = torch.randn(1, shape[0] * shape[1], 8)
        with float_only(block), torch.no_grad():
            output = tensors_of(block(x, shape))[0]
        if own is None or image in own:
            calls.add(to_units(block, BlockCall((x, shape), {}, [output], [torch.ones_like(output)], image)))
    return block, unit_module(block), calls


def extents(block, view, calls):
    def run():
        for call in calls:
            view(*call.args)

    with float_only(block):
        places = rescalings_of(block)
        return dict(zip((p.name for p in places), zip(places, channel_extents(places, run), strict=True), strict=True))


def ratio(span):
    return float(span.max() / span.min())


def test_full_strength_makes_channels_even():
    block, view, calls = quantized_block()
    before = extents(block, view, calls)
    factors = equalize(block, view, calls, 1.0)
    after = extents(block, view, calls)
    assert list(factors) == ["norm1", "query_key", "value_proj", "norm2"]
    for name in ("norm1", "value_proj", "norm2"):
        place, extent = after[name]
        assert ratio(place.imbalance(*before[name][1])) > 3
        assert ratio(place.imbalance(*extent)) == pytest.approx(1.0, abs=1e-3)
    place, extent = after["query_key"]
    query, key = place.spans(*extent).values()
    assert ratio(query / key) == pytest.approx(1.0, abs=1e-3)
    for c in factors.values():
        assert float(c.log().mean()) == pytest.approx(0.0, abs=1e-6)


def test_half_strength_goes_half_the_way():
    block, view, calls = quantized_block()
    place, extent = extents(block, view, calls)["norm1"]
    equalize(block, view, calls, 0.5)
    place, after = extents(block, view, calls)["norm1"]
    assert ratio(place.imbalance(*after)) == pytest.approx(ratio(place.imbalance(*extent)) ** 0.5, rel=1e-3)


def test_the_block_keeps_its_output_and_gets_new_ranges():
    block, view, calls = quantized_block()
    for _, layer in quantized_layers(block):
        for quantizer in layer.quantizers.values():
            far = torch.full((quantizer.groups,), 99.0)
            quantizer.observer.load([torch.stack([-far, far])])
    equalize(block, view, calls, 1.0)
    with float_only(block), torch.no_grad():
        for call in calls:
            assert torch.allclose(view(*call.args).flatten(1), call.targets, atol=1e-4)
    got = {
        (name, role): quantizer.observed
        for name, layer in quantized_layers(block)
        for role, quantizer in layer.quantizers.items()
    }
    for (name, role), observed in got.items():
        untouched = bool((observed[0] == -99).all())
        assert untouched == (role not in RESCALED.get(name, ())), (name, role)
    quantizers = {(n, r): q for n, layer in quantized_layers(block) for r, q in layer.quantizers.items()}
    for (name, role), quantizer in quantizers.items():
        if role not in RESCALED.get(name, ()):
            continue
        quantizer.forget_observed()
        if role == "weight":
            quantizer.observe(block.get_submodule(name).weight)
    with quantizer_mode(quantizers.values(), QuantizerMode.OBSERVE), torch.no_grad():
        for call in calls:
            view(*call.args)
    for key, quantizer in quantizers.items():
        if key[1] in RESCALED.get(key[0], ()):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(quantizer.observed, got[key], strict=True)), key
            assert quantizer.mode is QuantizerMode.QUANTIZE


def equalized(own=None):
    block, view, calls = quantized_block(IMAGES, own)
    equalize(block, view, calls, 1.0)
    ranges = [q.observed for _, layer in quantized_layers(block) for q in layer.quantizers.values() if q.observed]
    return [*block.parameters(), *(t for pair in ranges for t in pair)]


def work(rank, processes, port, folder):
    torch.set_num_threads(1)
    with process_group(rank, processes, port):
        torch.save([t.detach() for t in equalized(own_images(IMAGES))], f"{folder}/{rank}.pth")


def test_any_number_of_processes_gives_the_same_bits(tmp_path, free_port):
    want = equalized()
    processes = 4  # one of them has no image
    in_processes(work, processes, free_port, str(tmp_path))
    for rank in range(processes):
        got = torch.load(tmp_path / f"{rank}.pth", weights_only=True)
        assert len(got) == len(want)
        assert all(map(torch.equal, want, got))
