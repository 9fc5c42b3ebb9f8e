import math
import os
import re
from collections import Counter

import pytest
import torch
from small_classifiers import SWIN, VIT, arguments, made
from torch import nn

from apq_mmdet.engine.classification import LogitsTask, build_classifier, data_config, evaluate, load_weights
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import quantize_model
from apq_mmdet.policy import Policy

PAPER = (
    *("vit_small_patch16_224", "vit_base_patch16_224"),
    *("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"),
    *("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models_are_quantized_whole(name):
    with torch.device("meta"):
        model = build_classifier(name, {})
    blocks = sum(type(module).__name__ in ("Block", "SwinTransformerBlock") for module in model.modules())
    assert blocks == (24 if "small" in name or "base" in name else 12) if "swin" in name else blocks == 12
    table = quantize_model(model, Policy.from_dict({"w_bits": 4, "a_bits": 4}))
    merges = 3 if "swin" in name else 0
    assert Counter((row.kind, row.role) for row in table if row.bits) == {
        ("Conv2d", "weight"): 1,
        ("Conv2d", "input"): 1,
        ("Linear", "weight"): 4 * blocks + merges + 1,  # the head
        ("Linear", "input"): 4 * blocks + merges + 1,
        **{("MatMul", role): blocks for role in ("query", "key", "attention", "value")},
    }
    assert {row.kind for row in table if not row.bits} == {"LayerNorm"}


def test_images_of_the_patch_embedding_keep_8_bits_as_mmdets_do(folders, classifiers, tmp_path):
    run = made(folders, classifiers, tmp_path, "--no-eval", "--w-bits", 4, "--a-bits", 4)
    bits = {(row.layer, row.role): row.bits for row in run.table}
    assert (bits["patch_embed.proj", "input"], bits["patch_embed.proj", "weight"]) == (8, 4)
    assert (bits["head", "input"], bits["head", "weight"]) == (4, 4)


@pytest.mark.parametrize(("given", "size"), [(32, (3, 32, 32)), ((32, 48), (3, 32, 48)), (None, (3, 224, 224))])
def test_images_have_the_models_size(given, size):
    model_args = {} if given is None else {"img_size": given}
    model = build_classifier(VIT, {**model_args, "depth": 1, "embed_dim": 12})
    assert data_config(model, model_args)["input_size"] == size


def test_only_rgb_images_are_read():
    with pytest.raises(BadInputError, match="takes images of 1 channels"):
        data_config(build_classifier(VIT, {**arguments(VIT), "in_chans": 1}), {"in_chans": 1})


def test_the_loss_is_the_divergence_of_class_probabilities():
    a, b = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[1.0, 1.0, 2.0]])
    p, q = ([math.exp(v) / sum(math.exp(w) for w in t[0]) for v in t[0].tolist()] for t in (a, b))
    expected = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    task = LogitsTask()
    assert float(task.loss(b, a, None)) == pytest.approx(expected, rel=1e-5)
    model = nn.Linear(3, 3)
    assert torch.equal(task.teacher(model, a)[0], model(a))
    assert torch.equal(task.student(model, a, None), model(a))


def test_accuracy_by_hand():
    """Eight classes, scores that rank them 0, 1, 2, ...: an image of label l is right among the first l + 1."""
    scores = -torch.arange(8.0)
    labels = [0, 0, 1, 4, 5, 7]
    images = [(scores, label) for label in labels]
    model = nn.Linear(8, 8, bias=False)
    nn.init.eye_(model.weight)
    expected = {"top1": 100 * 2 / 6, "top5": 100 * 4 / 6}
    for batch_size in (1, 4):
        assert evaluate(model, images, batch_size, 0, "by hand") == pytest.approx(expected)


def state_of(name, **changed):
    torch.manual_seed(1)
    return build_classifier(name, {**arguments(name), **changed}).state_dict()


def loads_into(name, path):
    model = build_classifier(name, arguments(name))
    load_weights(model, path)
    return model.state_dict()


def as_microsoft(state):
    """The keys of Microsoft's Swin, which merges patches at the end of a stage and keeps its index buffers."""
    state = {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key).replace(
            "head.fc.", "head."
        ): value
        for key, value in state.items()
    }
    return {**state, "layers.0.blocks.0.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        (VIT, lambda state: state),
        (VIT, lambda state: {"model": state}),
        (VIT, lambda state: {"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}),
        (SWIN, lambda state: {"model": as_microsoft(state)}),
    ],
    ids=["plain", "DeiT's", "distributed", "Microsoft's"],
)
def test_published_checkpoints_load(tmp_path, name, wrap):
    state = state_of(name)
    torch.save(wrap(state), tmp_path / "float.pth")
    loaded = loads_into(name, tmp_path / "float.pth")
    assert all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize(("name", "changed"), [(VIT, dict(patch_size=16)), (SWIN, dict(window_size=2))], ids=str)
def test_weights_of_other_sizes_are_resampled_only_where_that_is_meant(tmp_path, name, changed):
    torch.save(state_of(name, **changed), tmp_path / "other.pth")
    with pytest.raises(BadInputError, match=r"has other sizes of .*; to resample it, name"):
        loads_into(name, tmp_path / "other.pth")
    model = build_classifier(name, arguments(name))
    load_weights(model, tmp_path / "other.pth", resample=True)
    norm = "norm.weight"
    assert torch.equal(model.state_dict()[norm], state_of(name, **changed)[norm])


def test_safetensors_load(tmp_path):
    from safetensors.torch import save_file

    state = state_of(VIT)
    save_file(state, tmp_path / "float.safetensors")
    loaded = loads_into(VIT, tmp_path / "float.safetensors")
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    with pytest.raises(BadInputError, match=r"broken\.safetensors cannot be read"):
        loads_into(VIT, tmp_path / "broken.safetensors")


def without(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "norm.bias"), r"another architecture .* lacks norm\.bias$"),
        (lambda s: {**s, "blocks.2.norm1.bias": torch.ones(32)}, r"holds unknown blocks\.2\.norm1\.bias$"),
        (lambda s: {**s, "head.weight": torch.ones(5, 32)}, r"does not fit: size mismatch for head\.weight.*5, 32"),
        (lambda s: {**s, "norm.bias": torch.full((32,), torch.nan)}, r"weights 'norm\.bias' hold NaN or infinity"),
        (lambda s: {"state_dict": {}}, "holds no state_dict"),
        (lambda s: [1, 2], "holds no state_dict"),
    ],
)
def test_wrong_checkpoints(tmp_path, change, message):
    torch.save(change(state_of(VIT)), tmp_path / "wrong.pth")
    with pytest.raises(BadInputError, match=message):
        loads_into(VIT, tmp_path / "wrong.pth")


def test_a_pickle_with_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch " + str(tmp_path / "ran"),)

    torch.save({"state_dict": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(BadInputError, match="cannot be loaded safely"):
        loads_into(VIT, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_factors_of_deit_3_have_other_names(tmp_path):
    name, small = "deit3_small_patch16_224", dict(img_size=32, embed_dim=32, depth=1, num_heads=2)
    model = build_classifier(name, small)
    state = {
        key.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): 2 * value
        for key, value in model.state_dict().items()
    }
    assert "blocks.0.gamma_1" in state
    torch.save({"model": state}, tmp_path / "deit3.pth")
    load_weights(model, tmp_path / "deit3.pth")
    assert torch.equal(model.blocks[0].ls1.gamma, state["blocks.0.gamma_1"])


def test_an_old_timm_is_refused(monkeypatch):
    monkeypatch.setattr("timm.__version__", "1.0.19")
    with pytest.raises(BadInputError, match=r"timm >= 1.0.31 is needed and 1.0.19 is installed: pip install"):
        build_classifier(VIT, {})
