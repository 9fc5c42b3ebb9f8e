"""Every type of detector that mmdet ships with Swin, through the command; docs/support.md says what came of it."""

import importlib.util
import re

import pytest
import torch
from mmdet.apis import init_detector
from support_table import CONFIGS, DOCUMENT, SCOPES, render, run, run_all, small_config

from apq_mmdet.layers import QuantizedLayer, packed_state_dict
from apq_mmdet.models import QuantizedDetector

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is not None, reason="with transformers, GLIP would ask for its weights"
)
RUN = {
    *("ATSS", "CascadeRCNN", "DDQDETR", "DINO", "DeformableDETR", "FasterRCNN", "Mask2Former", "MaskRCNN"),
    *("Mask2Former (panoptic)", "MaskFormer (panoptic)", "RTMDet", "RetinaNet"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("support")


@pytest.fixture(scope="module")
def rows(folder):
    return {row.detector: row for row in run_all(folder)}


def test_document_is_up_to_date(rows):
    assert DOCUMENT.read_text() == render(rows.values()), "run: python benchmarks/support_table.py --write"


def test_what_runs_and_what_is_refused_with_a_reason(rows):
    for name, row in rows.items():
        for scope, outcome in row.outcomes.items():
            assert outcome.code == (0 if name in RUN else 2), (name, scope, outcome.message)
            assert bool(outcome.message) == bool(outcome.code)
        assert tuple(row.outcomes) == (SCOPES if name in RUN else SCOPES[:1])
    assert set(rows) > RUN


def test_every_quantized_detector_was_measured(rows):
    for name in RUN:
        for outcome in rows[name].outcomes.values():
            kinds = {re.match(r"coco/(\w+)_mAP$", key)[1] for key in outcome.metrics if key.endswith("_mAP")}
            masks = name in ("MaskRCNN", "Mask2Former")
            assert kinds == (set() if "panoptic" in name else {"bbox", "segm"} if masks else {"bbox"})


def test_every_layer_has_bits_or_a_reason(rows):
    for name in RUN:
        for scope, outcome in rows[name].outcomes.items():
            assert all(bool(layer["bits"]) != bool(layer["reason"]) for layer in outcome.layers)
            parts = {layer["layer"].split(".")[0] for layer in outcome.layers if layer["bits"]}
            assert (parts == {"backbone"}) == (scope == "backbone")


def kinds_of(layers, pattern):
    """Quantized kinds below what a pattern matches."""
    return {layer["layer"].split(".")[-1] for layer in layers if layer["bits"] and re.search(pattern, layer["layer"])}


def test_attention_and_deformable_attention_are_quantized(rows):
    dense = {"q_proj", "k_proj", "v_proj", "out_proj", "query_key", "attention_value"}
    deformable = {"sampling_offsets", "attention_weights", "value_proj", "output_proj"}
    for name in ("DDQDETR", "DINO", "DeformableDETR"):
        layers = rows[name].outcomes["detector"].layers
        assert kinds_of(layers, r"^decoder\.layers\.\d\.self_attn\.") == dense
        assert kinds_of(layers, r"^decoder\.layers\.\d\.cross_attn\.") == deformable
        assert kinds_of(layers, r"^encoder\.layers\.\d\.self_attn\.") == deformable
    layers = rows["Mask2Former"].outcomes["detector"].layers
    for part in ("self_attn", "cross_attn"):
        assert kinds_of(layers, rf"transformer_decoder\.layers\.\d\.{part}\.") == dense
    assert kinds_of(layers, r"pixel_decoder\.encoder\.layers\.\d\.self_attn\.") == deformable


def assert_loads_completely(work_dir):
    """The checkpoint holds no float weight of a quantized layer, and saving what was loaded gives the same."""
    model = init_detector(str(work_dir / "config.py"), str(work_dir / "quantized.pth"), device="cpu")
    assert isinstance(model, QuantizedDetector)
    saved = torch.load(work_dir / "quantized.pth", weights_only=True)["state_dict"]
    again = packed_state_dict(model)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[key], saved[key]) for key in saved)
    for layer, module in model.named_modules(remove_duplicate=False):  # convolutions that levels share have many names
        if isinstance(module, QuantizedLayer) and "weight" in getattr(module, "quantizers", ()):
            assert f"{layer}.weight" not in saved
            assert f"{layer}.weight_codes" in saved


@pytest.mark.parametrize("name", ["DINO", "DDQDETR", "Mask2Former", "RTMDet"])
def test_checkpoints_load_completely(rows, folder, name):
    assert_loads_completely(folder / f"{list(rows).index(name)}-detector")


@pytest.mark.parametrize("name", ["MaskRCNN", "Mask2Former", "RTMDet"])
def test_the_default_recipe(rows, folder, name):
    cfg = small_config(CONFIGS / rows[name].config, folder / "data")
    grids = [f"model.quant.search.grids.{kind}=[0.5,1.1,2]" for kind in ("Linear", "Conv2d", "MatMul")]
    options = ["--recipe", "apq_plus", "--cfg-options", *grids, "model.quant.compensation.ranges=2"]
    assert run(cfg, "detector", folder / f"apq_plus-{name}", *options).message == ""
    assert_loads_completely(folder / f"apq_plus-{name}")


def test_panoptic_quality_needs_panopticapi(rows, folder):
    if importlib.util.find_spec("panopticapi"):
        pytest.skip("panopticapi is installed")
    cfg = small_config(CONFIGS / rows["MaskFormer (panoptic)"].config, folder / "data")
    outcome = run(cfg, "backbone", folder / "panoptic")
    assert outcome.code == 2
    assert re.search(
        "evaluation data cannot be read: ImportError: panopticapi is not installed.*--no-eval", outcome.message
    )
