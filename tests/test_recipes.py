"""Every shipped recipe: it parses, calibrates, and its checkpoint gives the calibrated model back."""

from dataclasses import replace

import pytest
import torch
from helpers import ROOT, build_swin, recipe, short_grids
from mmdet.registry import MODELS
from mmengine.config import Config

from apq_mmdet.calibration import Recipe, calibrate, calibrator
from apq_mmdet.engine.quantized_config import load_recipe, quantized_config
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import float_only, packed_state_dict, quantize_model, quantized_layers

NAMES = sorted(path.stem for path in (ROOT / "configs" / "_base_" / "recipes").glob("*.py"))
DRAWN = torch.Generator().manual_seed(0)  # the same whatever else has been imported
IMAGES = [torch.randn(1, 3, 41, 50, generator=DRAWN), torch.randn(1, 3, 29, 36, generator=DRAWN)]


def shortened(name, **settings):
    """A recipe at 4 bits, or what else is said, with fewer candidates and training steps, otherwise as it is."""
    quant = load_recipe(name)
    if "search" in quant:
        grids = {key: (first, last, min(n, 4)) for key, (first, last, n) in quant["search"]["grids"].items()}
        settings["search"] = dict(grids=grids, rounds=1)
    stages = quant.get("reconstruction")
    if stages:
        stages = stages if isinstance(stages, list) else [stages]
        settings["reconstruction"] = [{**stage, "iterations": 8, "batch": 4} for stage in stages]
    return recipe(name, **settings)


def quantized(settings):
    torch.manual_seed(3)
    model = build_swin(stages=2)
    quantize_model(model, settings.policy)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name):
    settings = shortened(name)
    assert settings.name == name
    assert (load_recipe(name)["w_bits"], load_recipe(name)["a_bits"]) == (8, 8)
    model = quantized(settings)
    with torch.no_grad(), float_only(model):
        want = model(IMAGES[0])
    calibrate(model, IMAGES, settings)
    loaded = quantized(settings)
    loaded.load_state_dict(packed_state_dict(model), strict=True)
    with torch.no_grad():
        got, again = model(IMAGES[0]), loaded(IMAGES[0])
    for output, same, exact in zip(got, again, want, strict=True):
        assert bool(output.isfinite().all())
        assert torch.equal(output, same)
        assert 0 < float((output - exact).norm() / exact.norm()) < 1


@pytest.mark.parametrize("name", NAMES)
def test_models_of_double_precision_are_calibrated_as_others_are(name):
    settings, errors = shortened(name, w_bits=3, a_bits=3), []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        model, x = build_swin(depth=1).to(dtype), IMAGES[0].to(dtype)
        with torch.no_grad():
            (want,) = model(x)
        quantize_model(model, settings.policy)
        calibrate(model, [x], settings)
        with torch.no_grad():
            (got,) = model(x)
        assert got.dtype == dtype
        errors.append(float((got - want).norm() / want.norm()))
    assert errors[1] == pytest.approx(errors[0], rel=0.3)  # ties break in another way


PAPERS_OBJECTIVE = dict(type="hessian", eliminate=0.1, eliminate_by="error")
NARROW = {  # grids of the paper's reconstruction
    "Linear": (0.7, 1.1, 100),
    "Conv2d": (0.9, 1.2, 100),
    "ConvTranspose2d": (0.9, 1.2, 100),
    "MatMul": (0.9, 1.2, 100),
}


def grids_of(settings):
    return settings.search.grids


PARTS = {  # what makes a recipe what it is
    "apq": lambda r: (
        (r.search.metric, r.search.order, r.search.rounds, r.search.objective)
        == ("block", "backward", 3, PAPERS_OBJECTIVE)
        and [len(r.search.factors(kind)) for kind in ("Linear", "Conv2d", "MatMul")] == [100, 100, 100]
    ),
    "apq_plus": lambda r: (
        [(s.rounding, s.max_bits) for s in r.reconstruction] == [("straight_through", 3)]
        and (r.search.metric, r.search.block_input, r.equalize) == ("module", "quantized", 1)
        and (len(r.search.factors("Linear")), r.compensation.ranges, r.compensation.weighted) == (41, 41, False)
    ),
    "minmax": lambda r: r.observer == "minmax" and r.search is None and not r.equalize,
    "apq_pc": lambda r: grids_of(r) == {**NARROW, "MatMul": (0.1, 1.2, 100)} and r.search.shortlist == 0,
    "apq_fast": lambda r: (
        grids_of(r) == {kind: (*grid[:2], 20) for kind, grid in NARROW.items()}
        and (r.search.rounds, r.search.shortlist, r.search.windows, r.search.rows) == (1, 6, 2, 32)
        and (r.search.metric, r.search.objective) == ("block", PAPERS_OBJECTIVE)
    ),
    "apq_pc_fast": lambda r: (
        grids_of(r)["MatMul"] == (0.1, 1.2, 23) and (r.search.rounds, r.search.shortlist, r.search.windows) == (1, 6, 2)
    ),
    "percentile": lambda r: r.observer == "percentile" and r.search is None,
    "base_ptq": lambda r: r.search.objective == dict(type="cosine") and r.search.rounds == 1,
    "ptq4vit": lambda r: r.search.objective == dict(type="hessian") and r.search.rounds == 3,
    "repq": lambda r: r.equalize == 1 and r.search.factors("Linear") == [1.0],
    "adalog": lambda r: r.equalize == 1 and r.search.metric == "module",
    "isvit": lambda r: [(s.rounding_lr > 0, s.step_lr > 0) for s in r.reconstruction] == [(False, True), (True, False)],
    "erq": lambda r: r.compensation.rounding and not r.compensation.weighted and not r.compensation.ranges,
    "brecq": lambda r: [(s.weighting, s.keep_float) for s in r.reconstruction] == [("hessian", 1), ("hessian", 0)],
    "qdrop": lambda r: [(s.weighting, s.keep_float) for s in r.reconstruction] == [("none", 0.5)],
    "aphq": lambda r: r.importance == "perturbation" and r.reconstruction[0].weighting == "absolute",
    "fimaq": lambda r: r.importance == "disturbed" and r.reconstruction[0].weighting == "fisher",
    "qwt": lambda r: r.policy.output_compensation and r.search.block_input == "quantized",
}


def test_the_parts_of_all_recipes_are_told():
    assert set(PARTS) == set(FORMATS) == set(NAMES)


@pytest.mark.parametrize("name", PARTS)
def test_parts(name):
    assert PARTS[name](recipe(name))


FORMATS = {  # of the attention maps, of the input behind the GELU, and all that weights, other inputs and keys have
    "minmax": ("matthew, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "apq": ("matthew, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "apq_fast": ("matthew, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "apq_pc": ("affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "apq_pc_fast": ("affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "percentile": ("affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "base_ptq": ("affine, symmetric", "affine, symmetric", "affine, symmetric"),
    "ptq4vit": ("twin_softmax, asymmetric", "twin_gelu, asymmetric", "affine, symmetric"),
    "repq": ("log_sqrt2, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "adalog": ("adaptive_log, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "isvit": ("shift_log2, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "apq_plus": ("row_affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "erq": ("log_sqrt2, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "qdrop": ("affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "brecq": ("affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "aphq": ("affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "fimaq": ("affine, asymmetric", "affine, asymmetric", "affine, asymmetric"),
    "qwt": ("log_sqrt2, asymmetric", "affine, asymmetric", "affine, asymmetric"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(name):
    rows = {(row.layer.split("blocks.0.")[-1], row.role): row for row in quantized(recipe(name)).quantization_table}
    attention, gelu = rows["attn.w_msa.attention_value", "attention"], rows["ffn.layers.1", "input"]
    others = (("attn.w_msa.qkv", "weight"), ("attn.w_msa.proj", "input"), ("attn.w_msa.query_key", "key"))
    assert (attention.format, gelu.format) == FORMATS[name][:2]
    assert {rows[key].format for key in others} == set(FORMATS[name][2:])


def test_an_ablation_of_few_levels_reaches_all_linears():
    formats = load_recipe("apq_plus")["formats"]
    formats["linear_low"] = formats["linear_low"] | dict(input=dict(format="token_affine", granularity="tensor"))
    policy = recipe("apq_plus", a_bits=3, formats=formats, scope="detector").policy
    for name in (
        "backbone.stages.0.blocks.0.ffn.layers.1",
        "backbone.stages.0.blocks.0.attn.w_msa.qkv",
        "bbox_head.fc",
    ):
        spec = policy.scheme(name, "Linear", ("weight", "input"))[0]["input"]
        assert (spec.format, spec.granularity) == ("token_affine", "tensor")
    roi = policy.scheme("roi_head.bbox_head.fc_cls", "Linear", ("weight", "input"))[0]["input"]
    assert (roi.format, roi.granularity) == ("dynamic_affine", "tensor")


@pytest.mark.parametrize(("bits", "linear"), [(4, "affine, asymmetric"), (3, "token_affine, asymmetric")])
def test_three_bits_of_apq_plus_follow_the_tokens(bits, linear):
    rows = quantized(recipe("apq_plus", a_bits=bits)).quantization_table
    formats = {(row.kind, row.role): row.format for row in rows if row.bits}
    assert formats["Linear", "input"] == linear
    assert formats["Linear", "weight"] == formats["Conv2d", "input"] == "affine, asymmetric"


@pytest.fixture(scope="module")
def layers():
    """(name, kind, roles) of what scope `detector` quantizes."""
    cfg = Config.fromfile(ROOT / "configs/demo/cascade-mask-rcnn_swin-demo.py")
    model = MODELS.build(quantized_config(cfg, "minmax", dict(scope="detector")).model)
    return [(name, layer.kind, layer.roles) for name, layer in quantized_layers(model)]


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", NAMES)
def test_a_written_recipe_says_the_same(layers, name, bits):
    quant = load_recipe(name) | dict(w_bits=bits, a_bits=bits, scope="detector")
    written = Config.fromstring(Config(dict(quant=quant)).pretty_text, ".py").quant  # with sorted keys
    policies = [Recipe.from_dict(settings).policy for settings in (quant, written, reversed_keys(quant))]
    first, *others = [[policy.scheme(*layer) for layer in layers] for policy in policies]
    assert all(other == first for other in others)


def reversed_keys(settings):
    if not isinstance(settings, dict):
        return settings
    return {key: reversed_keys(value) for key, value in reversed(settings.items())}


@pytest.mark.parametrize("bits", [2, 4, 6, 7, 8])
def test_apq_plus_multiplies_signed_queries_and_keys_and_unsigned_attention_maps(bits):
    layers = dict(quantized_layers(quantized(recipe("apq_plus", a_bits=bits))))
    products = [layer for layer in layers.values() if layer.kind == "MatMul"]
    assert products
    for layer in products:
        for role in set(layer.roles) - {"value"}:
            quantizer = layer.quantizers[role]
            quantizer.observe(torch.rand(1, layer.heads, 4, 4))  # to one side of zero: the zero point is at an end
            quantizer.set_range_factor(1.0)
            lowest, highest = quantizer.shifted_bounds
            if role == "attention":
                assert (int(lowest.min()), int(highest.max())) == (0, 2**bits - 1)
            else:
                assert (int(lowest.min()) >= -128, int(highest.max()) <= 127) == (True, True)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("minmax", dict(equalise=1.0), r"quant: unknown key 'equalise'; did you mean 'equalize'"),
        ("minmax", dict(equalize=1.0), r"quant\.equalize works on searched blocks: it needs a quant\.search"),
        ("minmax", dict(output_compensation=True), r"quant\.output_compensation works on searched blocks"),
        ("repq", dict(equalize=2), r"quant\.equalize: .* got 2"),
        ("erq", dict(compensation=dict(range=3)), r"quant\.compensation: unknown key 'range'; did you mean 'ranges'"),
        (
            "base_ptq",
            dict(search=dict(objective=dict(type="cosine", eliminate=0.1))),
            r"quant\.search\.objective: .*eliminate must be 0",
        ),
        ("qdrop", dict(reconstruction=dict(weighting="fischer")), r"reconstruction\.weighting: .*mean 'fisher'"),
        (
            "brecq",
            dict(reconstruction=[dict(), dict(rounding_lr=0, step_lr=0)]),
            r"quant\.reconstruction\[1\]: nothing is learned",
        ),
        ("qdrop", dict(search=dict(windows=2)), r"quant\.search: windows=2 needs block_input='float'"),
        (
            "percentile",
            dict(observer="quantile"),
            r"quant\.observer: unknown value 'quantile'; known: minmax",
        ),
        ("percentile", dict(observer=["minmax"]), r"quant\.observer: unknown value \['minmax'\]; did you mean"),
        ("apq_plus", dict(search=dict(objectives=None)), r"quant\.search\.objectives: expected dict\(name="),
        (
            "apq_plus",
            dict(search=dict(objectives=dict(heads=dict(type="mse")))),
            r"quant\.search\.objectives\.heads: expected dict\(pattern=",
        ),
        (
            "apq_plus",
            dict(search=dict(objectives=dict(heads=dict(pattern="re:*head", type="mse")))),
            r"quant\.search\.objectives\.heads\.pattern: 're:\*head' is no regular expression",
        ),
        (
            "apq_plus",
            dict(search=dict(objectives=dict(heads=dict(pattern="*", type="msa")))),
            r"quant\.search\.objectives\.heads: unknown type 'msa'",
        ),
        ("aphq", dict(compensation=dict()), r"quant\.compensation\.weighted weighs layers' tokens by gradients"),
        (
            "aphq",
            dict(search=dict(metric="module", objective=dict(type="hessian"))),
            r"quant\.search\.metric 'module' judges layers by gradients",
        ),
        (
            "aphq",
            dict(search=dict(metric="module", objectives=dict(a=dict(pattern="*head*", type="hessian")))),
            r"quant\.search\.metric 'module' judges layers by gradients",
        ),
        ("aphq", dict(importance="perturbed"), r"quant\.importance: unknown value 'perturbed'; .*'perturbation'"),
    ],
)
def test_refusals(name, settings, message):
    with pytest.raises(BadInputError, match=message):
        recipe(name, **settings)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (dict(linear=dict(kind="Linear", weight=dict(format="log_sqrt2"))), r"format 'log_sqrt2' does not fit role"),
        (
            dict(products=dict(kind="MatMul", query=dict(format="log_sqrt2"))),
            r"role 'attention', not for 'query'",
        ),
        (
            dict(linear=dict(kind="Linear", input=dict(format="row_affine"))),
            r"role 'attention', not for 'input'",
        ),
        (
            dict(linear=dict(kind="Linear", input=dict(format="matthew"))),
            r"softmax outputs and is for role 'attention'",
        ),
        (dict(products=dict(kind="MatMul", value=dict(format="twin_gelu"))), r"GELU outputs and is for role 'input'"),
        (
            dict(products=dict(kind="MatMul", attention=dict(format="adaptive_log", symmetric=True))),
            r"'attention': .*symmetric=True makes no sense",
        ),
        (dict(qkv=dict(kind="Linear", pattern="*.qkv", weight=dict(granularity=5))), r"granularity 5 does not fit"),
    ],
)
def test_formats_that_do_not_fit(formats, message):
    with pytest.raises(BadInputError, match=message):
        quantized(recipe("minmax", formats=formats))


def test_objectives_of_single_blocks():
    search = recipe("apq_plus").search
    assert search.for_block("backbone.stages.0.blocks.1").objective == dict(type="mse")
    for name in ("neck", "rpn_head", "roi_head.bbox_head", "roi_head.mask_head.1"):
        assert search.for_block(name).objective == dict(type="hessian")


def test_the_last_of_the_objectives_that_speak_of_a_block_is_its_own():
    rules = dict(
        all=dict(pattern="*", type="cosine"),
        heads=dict(pattern="*head", type="mse"),
        rpn=dict(pattern="rpn_*", type="hessian"),
    )
    search = recipe("apq_plus", search=dict(objectives=rules)).search
    kinds = {name: search.for_block(name).objective["type"] for name in ("neck", "bbox_head", "rpn_head")}
    assert kinds == {"neck": "cosine", "bbox_head": "mse", "rpn_head": "hessian"}


def test_a_block_is_searched_by_its_own_objective(monkeypatch):
    kinds = []

    def search_block(module, calls, search, progress):
        kinds.append(search.objective["type"])
        return original(module, calls, search, progress)

    original = calibrator.search_block
    monkeypatch.setattr(calibrator, "search_block", search_block)
    rules = dict(second=dict(pattern="*.blocks.1", type="cosine"))
    settings = recipe("apq_plus", search=dict(objectives=rules, grids=short_grids()))
    report = calibrate(quantized(settings), IMAGES, settings)
    assert kinds == ["cosine" if block.block.endswith(".blocks.1") else "mse" for block in report.blocks]
    assert "cosine" in kinds


@pytest.mark.parametrize(("bits", "learned"), [(2, 6), (3, 6), (4, 0)])
def test_apq_plus_learns_where_weights_have_few_bits(bits, learned, monkeypatch):
    settings = replace(shortened("apq_plus"), policy=replace(recipe("apq_plus").policy, w_bits=bits))
    blocks = []
    monkeypatch.setattr(calibrator, "reconstruct", lambda module, *_: blocks.append(module))
    calibrate(quantized(settings), IMAGES, settings)
    assert len(blocks) == learned


def test_inputs_that_apq_plus_divides():
    policy = recipe("apq_plus").policy
    for name, kind, granularity in (
        ("backbone.stages.0.blocks.1.ffn.layers.1", "Linear", "channel"),
        ("backbone.model.layers_0.blocks.1.mlp.fc2", "Linear", "channel"),
        ("neck.fpn_convs.0.conv", "Conv2d", "channel"),
        ("rpn_head.rpn_conv", "Conv2d", "channel"),
        ("backbone.stages.0.blocks.1.ffn.layers.0.0", "Linear", "tensor"),
        ("backbone.patch_embed.projection", "Conv2d", "tensor"),
    ):
        assert policy.scheme(name, kind, ("weight", "input"))[0]["input"].granularity == granularity


@pytest.mark.parametrize(
    ("name", "kind", "formats"),
    [
        ("neck.fpn_convs.0.conv", "Conv2d", {2: "affine channel", 4: "affine channel", 6: "affine channel"}),
        (
            "rpn_head.rpn_conv",
            "Conv2d",
            {2: "dynamic_affine channel", 4: "dynamic_affine channel", 6: "affine channel"},
        ),
        ("roi_head.bbox_head.0.fc_cls", "Linear", {3: "dynamic_affine tensor", 4: "dynamic_affine tensor"}),
        ("roi_head.mask_head.conv_logits", "Conv2d", {4: "dynamic_affine channel"}),
        ("panoptic_head.transformer_decoder.layers.0.ffn.layers.1", "Linear", {3: "token_affine channel"}),
        ("head.fc", "Linear", {3: "token_affine channel", 4: "affine channel"}),  # of a classifier
    ],
)
def test_inputs_of_heads_in_apq_plus(name, kind, formats):
    for bits, wanted in formats.items():
        spec = recipe("apq_plus", a_bits=bits).policy.scheme(name, kind, ("weight", "input"))[0]["input"]
        assert f"{spec.format} {spec.granularity}" == wanted
