import re

import pytest
import torch
from helpers import CHECKPOINT, build_swin, recipe, short_grids
from torch import nn

from apq_mmdet.calibration import FeatureTask, calibrate
from apq_mmdet.engine import command
from apq_mmdet.engine.counting import suffix_operations
from apq_mmdet.engine.plan import (
    Sizes,
    _bytes,
    _number,
    _seconds_text,
    _size_lines,
    make_plan,
    render_plan,
    weight_sizes,
)
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import packed_state_dict, quantize_model
from apq_mmdet.quantizers import QuantizerMode

BUDGET = 2**30


def plan_of(model, used, images, budget=BUDGET):
    quantize_model(model, used.policy)
    return make_plan(model, images, FeatureTask(), used, budget)


@pytest.fixture
def swin_images():
    return [torch.randn(1, 3, 32, 32) for _ in range(3)]


def test_every_module_stays_in_its_mode(swin_images):
    model, used = build_swin(), recipe("minmax")
    quantize_model(model, used.policy)
    model.train()
    model.stages[0].eval()
    before = [module.training for module in model.modules()]
    make_plan(model, swin_images, FeatureTask(), used, BUDGET)
    assert len(set(before)) == 2
    assert [module.training for module in model.modules()] == before


def test_layers_by_hand():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, groups=1),  # [1, 8, 6, 6]: 288 outputs of 27 products
        nn.Conv2d(8, 8, 3, stride=2, groups=4),  # [1, 8, 2, 2]: 32 outputs of 18 products
        nn.ConvTranspose2d(8, 5, 2, stride=2),  # [1, 5, 4, 4]: 80 outputs of 8 products
        nn.Flatten(),
        nn.Linear(80, 7),
    )
    used = recipe("apq", search=dict(rounds=2, grids=short_grids(8)))
    plan = plan_of(model, used, [torch.randn(1, 3, 6, 6)] * 4)
    # the recipe leaves the transposed convolution float: it is in the whole, but in no block
    assert [(b.name, b.operations) for b in plan.blocks] == [("0", 2 * 288 * 27), ("1", 2 * 32 * 18), ("4", 2 * 7 * 80)]
    assert plan.operations == sum(b.operations for b in plan.blocks) + 2 * 80 * 8
    # a layer alone: weight and input, 8 candidates each, 2 rounds
    for block in plan.blocks:
        assert (block.layers, block.ranges, block.ranked, block.judged) == (1, 2, 0, 32)
        assert block.search_operations == 32 * block.operations
    # input [1, 3, 6, 6], output and gradient [1, 8, 6, 6]
    assert plan.blocks[0].captured_bytes == 4 * (108 + 2 * 288)
    assert plan.teacher_bytes == 4 * 7
    assert plan.search_operations == 4 * 32 * sum(b.operations for b in plan.blocks)
    assert plan.captured_bytes == 4 * (28 + sum(b.captured_bytes for b in plan.blocks))


def test_a_swin_by_hand(swin_images):
    used = recipe("apq", search=dict(rounds=3, grids=short_grids(10)))
    model = build_swin()
    plan = plan_of(model, used, swin_images)
    assert [b.name for b in plan.blocks] == ["patch_embed", "stages.0.blocks.0", "stages.0.blocks.1"]
    # 8 x 8 tokens of 8 channels; padded to 2 x 2 windows of 49 tokens, 2 heads of 4 channels; 32 hidden channels
    embed = 2 * (64 * 8) * (3 * 4 * 4)
    qkv, logits, values, project = 2 * 196 * 8 * 24, *[2 * 4 * 2 * 49 * 49 * 4] * 2, 2 * 196 * 8 * 8
    ffn = 2 * 64 * 8 * 32
    whole = qkv + logits + values + project + 2 * ffn
    assert [b.operations for b in plan.blocks] == [embed, whole, whole]
    assert plan.operations == embed + 2 * whole
    block = plan.blocks[1]
    assert (block.layers, block.ranges, block.judged) == (6, 12, 12 * 10 * 3)
    suffixes = [whole, whole - qkv, values + project + 2 * ffn, project + 2 * ffn, 2 * ffn, ffn]
    assert block.search_operations == 3 * 10 * 2 * sum(suffixes)
    assert block.captured_bytes == 3 * 4 * 64 * 8
    assert plan.blocks[0].captured_bytes == 4 * (3 * 32 * 32 + 2 * 64 * 8)


@pytest.mark.parametrize(
    ("search", "expected"),
    [
        (dict(shortlist=6), (2 * 2 * 20, 2 * 2 * 6)),
        (dict(shortlist=30), (0, 2 * 2 * 20)),
        (dict(metric="module", shortlist=6), (2 * 2 * 20, 0)),
    ],
)
def test_where_candidates_are_judged(swin_images, search, expected):
    used = recipe("apq", search=dict(rounds=2, grids=short_grids(20), **search))
    embed = plan_of(build_swin(), used, swin_images).blocks[0]
    assert (embed.ranked, embed.judged) == expected
    assert embed.search_operations == sum(expected) * embed.operations


def test_formats_that_bound_their_range_have_fewer_candidates(swin_images):
    used = recipe("apq", search=dict(rounds=1, grids=dict(short_grids(10), MatMul=(0.5, 1.4, 10))))
    block = plan_of(build_swin(), used, swin_images).blocks[1]
    assert block.judged == 11 * 10 + 6  # of attention maps, 0.9 and above


def test_a_module_that_runs_again_counts_whole():
    first, second, third = nn.Identity(), nn.Identity(), nn.Identity()
    call = [(third, 1), (first, 10), (second, 100), (first, 1000)]
    assert [suffix_operations(call, module) for module in (first, second, third)] == [1110, 1110, 1111]
    assert suffix_operations(call, nn.Identity()) == 0


def test_time_and_memory(swin_images):
    used = recipe("apq", search=dict(rounds=1, grids=short_grids(4)))
    plan = plan_of(build_swin(), used, swin_images, budget=20_000)
    assert plan.pass_seconds == pytest.approx(3 * 4 * plan.seconds)
    assert plan.search_seconds == pytest.approx(plan.search_operations * plan.seconds / plan.operations)
    assert plan.disk_bytes == plan.captured_bytes - 2_500  # an eighth of the budget holds captures
    anew = recipe("apq", search=dict(rounds=1, grids=short_grids(4), block_input="quantized"))
    assert sum(plan_of(build_swin(), anew, swin_images).passes.values()) == 4 + 1
    more = recipe("apq", importance="perturbation", equalize=1.0, search=dict(rounds=1, grids=short_grids(4)))
    assert plan_of(build_swin(), more, swin_images).passes == {"float pass": 1, "even channels": 3, "gradients": 6}
    plans = [
        plan_of(build_swin(), recipe("aphq", mlp_refit=on, reconstruction=None), swin_images) for on in (False, True)
    ]
    assert plans[1].passes == {**plans[0].passes, "refitted MLPs": 2}
    fixed, with_refit = ([block.fixed_operations for block in plan.blocks] for plan in plans)
    refit = 2 * 1000 * 512 * (8 * 32 * 2 + 32 * 8 * 6)  # steps, tokens, products of one
    assert [b - a for a, b in zip(fixed, with_refit, strict=True)] == [0, refit, refit]
    tokens = dict(tokens=dict(kind="Linear", input=dict(format="token_affine")))
    centered = recipe("apq", overrides=tokens, search=dict(rounds=1, grids=short_grids(4)))
    assert plan_of(build_swin(), centered, swin_images).passes["input centers"] == 1


def test_what_is_fitted_after_the_search(swin_images):
    learned = dict(iterations=10, batch=3, max_bits=3)
    settings = dict(
        search=dict(rounds=1, grids=short_grids(4)), overrides=dict(e=dict(pattern="patch_embed.*", bits=3))
    )
    used = recipe("apq", compensation=dict(weighted=False), reconstruction=learned, **settings)
    plan = plan_of(build_swin(), used, swin_images)
    embed, block, _ = plan.blocks
    # 64 tokens of 48 values, one layer: float and quantized runs, two matrices in float64; then the objective twice
    matrices = 2 * 2 * 2 * 64 * 48**2
    assert embed.fit_operations == 2 * embed.operations + matrices + 2 * embed.operations
    # 41 ranges, the regression and the rounding of 8 outputs, then the factors
    closed_forms = 2 * 48**2 * ((41 + 2 * 2) * 8 + 2 * 48)
    assert embed.fixed_operations == 10 * 3 * 3 * embed.operations // 64 + closed_forms
    # of six layers qkv, proj and the ffn's two have weights; 4 padded windows of 49 tokens, 64 tokens behind them
    matrices = 2 * 2 * 2 * (196 * 8**2 * 2 + 64 * 8**2 + 64 * 32**2)
    closed_forms = sum(2 * k**2 * (45 * n + 2 * k) for n, k in ((24, 8), (8, 8), (32, 8), (8, 32)))
    assert (block.fit_operations, block.fixed_operations) == (4 * 2 * block.operations + matrices, closed_forms)
    fitted = sum(3 * b.fit_operations + b.fixed_operations for b in plan.blocks)
    assert plan.fit_seconds == pytest.approx(fitted * plan.seconds / plan.operations)
    assert plan.calibration_seconds == pytest.approx(plan.pass_seconds + plan.search_seconds + plan.fit_seconds)
    assert "of them however many images there are" in render_plan(plan)
    weighted = recipe("apq", compensation=dict(weighted=True), **settings)
    assert plan_of(build_swin(), weighted, swin_images).blocks[1].fit_operations == 4 * 4 * block.operations + matrices


def test_ranges_of_weights_whose_errors_have_a_closed_form(swin_images):
    search = dict(metric="module", rounds=2, grids=short_grids(5), objective=dict(type="mse"))
    embed, block, _ = plan_of(build_swin(), recipe("apq", search=search), swin_images).blocks
    assert (embed.search_operations, embed.fixed_operations) == (2 * 10 * embed.operations, 0)  # a convolution
    assert block.ranked == 2 * 12 * 5
    # tokens of 8 values are part of two matrices for qkv, proj and the ffn's first layer, whose weights then take 5
    # products; of the second one [8, 32] runs take less
    sums = sum(2 * 2 * tokens * 8**2 for tokens in (196, 196, 64))
    runs = 2 * 196 * 8 * (24 + 8) + 2 * 64 * 8 * 32
    assert block.search_operations == 2 * (5 * (2 * block.operations - runs) + sums)
    assert block.fixed_operations == 2 * 5 * 2 * (24 + 8 + 32) * 8**2
    for changes in (
        dict(metric="block"),
        dict(objective=dict(type="hessian")),
        dict(objective=dict(type="mse", eliminate=0.1)),
    ):
        other = plan_of(build_swin(), recipe("apq", search={**search, **changes}), swin_images).blocks[1]
        assert other.search_operations >= 2 * 10 * block.operations
        assert other.fixed_operations == 0


def test_what_weighs_no_error_by_gradients_takes_none(swin_images):
    search = dict(metric="module", rounds=1, grids=short_grids(4), objective=dict(type="mse"))
    plan = plan_of(build_swin(), recipe("apq", search=search), swin_images)
    assert plan.passes == {"float pass": 1}
    assert plan.blocks[1].captured_bytes == 2 * 4 * 64 * 8
    weighed = dict(search, objectives=dict(one=dict(pattern="stages.0.blocks.1", type="hessian")))
    plan = plan_of(build_swin(), recipe("apq", search=weighed), swin_images)
    assert plan.passes == {"float pass": 1, "gradients": 3}
    assert [block.captured_bytes for block in plan.blocks[1:]] == [2 * 4 * 64 * 8, 3 * 4 * 64 * 8]


def test_samples_are_what_is_counted():
    images = [torch.randn(1, 3, 112, 112)]  # 28 x 28 tokens in 4 x 4 windows
    settings = dict(compensation=dict(weighted=False), reconstruction=dict(max_bits=4))

    def block_of(**search):
        used = recipe("apq", search=dict(rounds=1, grids=short_grids(4), **search), **settings)
        return plan_of(build_swin(), used, images).blocks[1]

    whole, tokens, windows = block_of(), block_of(tokens=4 * 49), block_of(windows=2)
    assert tokens == windows
    for key in ("search_operations", "fit_operations"):
        assert getattr(whole, key) == 4 * getattr(tokens, key)
    for key in ("operations", "captured_bytes", "judged", "fixed_operations"):
        assert getattr(whole, key) == getattr(tokens, key)


def test_a_step_takes_a_whole_call_where_it_cannot_be_taken_apart():
    model = nn.Sequential(nn.Linear(4, 6))  # no block class: a block of its own, whose calls stay whole
    used = recipe("apq", reconstruction=dict(iterations=10, batch=3), search=dict(rounds=1, grids=short_grids(4)))
    (block,) = plan_of(model, used, [torch.randn(5, 4)]).blocks
    assert block.fixed_operations == 10 * 3 * block.operations == 10 * 3 * 2 * 5 * 4 * 6


def test_sizes_are_those_of_the_checkpoint(swin_images):
    model = build_swin()
    before = sum(value.nbytes for value in model.state_dict().values())
    used = recipe("minmax", w_bits=3)
    quantize_model(model, used.policy)
    sizes = weight_sizes(model)
    assert sizes.state_float == before
    calibrate(model, swin_images, used)
    packed = packed_state_dict(model)
    assert sizes.state_packed == sum(value.nbytes for value in packed.values())
    weights = {k: v for k, v in packed.items() if k.endswith("weight_codes") or ".quantizers.weight." in k}
    assert sizes.weights_packed == sum(value.nbytes for value in weights.values())


def test_numbers_as_they_are_read():
    seconds = {0.25: "0.25 s", 119: "119 s", 600: "10 min", 7000: "117 min", 7200: "2 h", 864_000: "10.0 days"}
    assert {value: _seconds_text(value) for value in seconds} == seconds
    sizes = {1000: "1000 B", 1023: "1023 B", 1536: "1.5 KiB", 3 * 2**20: "3.0 MiB", 5 * 2**30: "5.0 GiB"}
    assert {value: _bytes(value) for value in sizes} == sizes
    numbers = {7: "7", 999: "999", 1000: "1 k", 12_340: "12.3 k", 12.34e9: "12.3 G"}
    assert {value: _number(value) for value in numbers} == numbers


def test_sizes_are_told_before_and_after():
    weights, whole = _size_lines(Sizes(4 * 2**10, 2**10, 3 * 2**20, 2 * 2**20))
    assert "4.0 KiB -> 1.0 KiB (4.0 times smaller)" in weights
    assert "3.0 MiB -> 2.0 MiB (1.5 times smaller)" in whole


def test_the_model_is_left_as_it_was(swin_images):
    model = build_swin()
    used = recipe("apq")
    quantize_model(model, used.policy)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    make_plan(model, swin_images, FeatureTask(), used, BUDGET)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    quantizers = [m for m in model.modules() if hasattr(m, "observed")]
    assert all(q.observed is None and q.mode is QuantizerMode.QUANTIZE for q in quantizers)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_minmax_searches_nothing(swin_images):
    plan = plan_of(build_swin(), recipe("minmax"), swin_images)
    assert (plan.search_operations, plan.captured_bytes, plan.passes) == (0, 0, {"float pass": 1})
    text = render_plan(plan)
    assert "nothing is searched" in text
    assert "nothing is captured" in text


def test_a_grid_without_candidates_is_refused(swin_images):
    used = recipe("apq", search=dict(grids=dict(short_grids(), MatMul=(0.1, 0.5, 4))))
    with pytest.raises(BadInputError, match="holds no range factor"):
        plan_of(build_swin(), used, swin_images)


def dry_run(config, work_dir, *options):
    args = ["--recipe", "apq_fast", "--w-bits", "4", "--a-bits", "4", "--num-calib", "2", "--device", "cpu"]
    args = [str(config), str(CHECKPOINT), "--work-dir", str(work_dir), *args, "--dry-run", *options]
    return command.main(args)


def test_the_command_prints_the_plan_and_does_nothing(config, tmp_path, capsys):
    states = tmp_path / "calibration"
    (states / "apq_capture_left").mkdir(parents=True)
    (states / "block.pth").write_bytes(b"kept")
    (states / "run.json").write_text("{}")
    (states / "finished").touch()
    assert dry_run(config, tmp_path, "--scope", "detector", "--eval-float") == 0
    text = capsys.readouterr().out
    assert "plan: MaskRCNN, recipe apq_fast, W4A4, scope detector" in text
    assert "on samples (windows = 2, rows = 32)" in text
    assert re.search(r"backbone\.patch_embed\.projection +Conv2d +input +8 ", text)  # which keeps eight bits
    # in the order of execution
    names = ("backbone.patch_embed", "backbone.stages.3.blocks.1", "neck", "rpn_head", "roi_head.mask_head")
    rows = [text.index(f"\n{name} ") for name in names]
    assert rows == sorted(rows)
    assert {p.name for p in states.iterdir()} == {"apq_capture_left", "block.pth", "finished", "run.json"}
    assert (states / "block.pth").read_bytes() == b"kept"
    assert not any((tmp_path / name).exists() for name in ("quantized.pth", "config.py", "report.json"))


def test_a_dry_run_makes_no_calibration_folder(config, tmp_path):
    assert dry_run(config, tmp_path, "--no-eval", "--resume") == 0
    assert not (tmp_path / "calibration").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--w-bits", "9"], "bits must be a whole number"),
        (["--cfg-options", "model.quant.search.grids.MatMul=(0.1,0.5,4)"], "holds no range factor"),
    ],
)
def test_bad_options(config, tmp_path, capsys, options, message):
    assert dry_run(config, tmp_path, *options) == 2
    assert message in capsys.readouterr().err


def test_resuming_another_run_is_refused(config, tmp_path, capsys):
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "run.json").write_text("{}")
    assert dry_run(config, tmp_path, "--resume", "--no-eval") == 2
    assert "belongs to another run" in capsys.readouterr().err
