"""The accuracy benchmark: its grid, its file of rows and its report. No test runs a calibration."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import accuracy
import pytest
from accuracy_grid import (
    ABLATIONS,
    BASE,
    ROOT,
    Spec,
    ablation_specs,
    append_row,
    expected_seconds,
    known_recipes,
    label,
    main_recipes,
    make_grid,
    missing,
    read_rows,
)
from accuracy_plots import draw_plots
from accuracy_report import box_and_mask, compared, mean_and_spread, render, summary_table

from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.engine import command

RECIPES = ["apq", "apq_fast", "minmax", "percentile"]
OLD_KEYS = ("detector", "scope", "bits", "recipe", "num_calib", "seed")


def metrics(box, mask):
    return {"coco/bbox_mAP": box / 100, "coco/segm_mAP": mask / 100}


def row(box=48.0, mask=47.0, reference=None, **changes):
    """A row as a run writes it."""
    spec = {"detector": "mask-rcnn", "scope": "backbone", "bits": "W4A4", "recipe": "minmax", **changes}
    return {
        "ground": "plain",
        "num_calib": 32,
        "seed": 0,
        "options": {},
        "num_val": None,
        **spec,
        "metrics": metrics(box, mask),
        "float_metrics": reference and metrics(*reference),
        "calibration_seconds": 64.0,
        "seconds": 100.0,
        "threads": 1,
        "cpu": "Abacus 1",
        "peak_memory_bytes": 800 * 2**20,
        "versions": {"apq_mmdet": "0.1.0", "torch": "2.13.0"},
        "commit": "0123abc",
    }


def old(new):
    """The row without the keys that came later."""
    return {k: v for k, v in new.items() if k not in ("ground", "options", "num_val", "seconds", "cpu", "commit")}


def spec(**changes):
    return Spec.from_row(row(**changes))


# -- grid -----------------------------------------------------------------------------------------------------


def test_most_telling_runs_come_first():
    grid = make_grid(["minmax", "percentile"], best=["percentile"], detectors=["mask-rcnn"], scopes=["backbone"])
    order = [(s.seed, s.ground, s.bits, s.recipe) for s in grid]
    first = [(g, b, r) for g in ("plain", "stressed") for b in ("W4A4", "W3A3") for r in ("minmax", "percentile")]
    more = [(g, b, "minmax") for g in ("plain", "stressed") for b in ("W8A8", "W6A6", "W2A4")]
    seeds = [(n, g, b, "percentile") for n in (1, 2) for g in ("plain", "stressed") for b in ("W4A4", "W3A3")]
    assert order == [(0, *key) for key in first + more] + seeds


def test_fast_form_stands_for_a_slow_main_recipe_and_the_slow_one_comes_last():
    assert main_recipes(RECIPES) == ["apq_fast", "minmax"]
    grid = make_grid(RECIPES)
    slow = [s for s in grid if s.recipe == "apq"]
    assert grid[-len(slow) :] == slow
    assert {s.bits for s in slow} == {"W4A4", "W3A3"}
    assert {(s.detector, s.ground) for s in slow} == {("mask-rcnn", "plain")}  # its fast form runs on all
    assert {s.ground for s in make_grid(RECIPES, grounds=["stressed"])} == {"stressed"}


def test_given_bits_and_scopes_hold_for_every_recipe():
    grid = make_grid(RECIPES, bits=["W5A5"], scopes=["detector"])
    assert {(s.recipe, s.bits, s.scope) for s in grid} == {(r, "W5A5", "detector") for r in RECIPES}


def test_whole_detectors_are_quantized_with_the_main_recipes_and_more_seeds_are_run_at_the_first_bits():
    grid = make_grid(["minmax", "percentile"], best=["minmax"])
    assert {(s.recipe, s.scope) for s in grid} == {
        ("minmax", "backbone"),
        ("minmax", "detector"),
        ("percentile", "backbone"),
    }
    assert {s.bits for s in grid if s.seed} == {"W4A4", "W3A3"} < {s.bits for s in grid}
    assert {s.seed for s in make_grid(["minmax"], best=["minmax"], bits=["W8A8"])} == {0, 1, 2}


def test_what_is_there_is_skipped():
    grid = make_grid(["minmax"], detectors=["mask-rcnn"], bits=["W4A4", "W3A3"], scopes=["backbone"])
    rows = [old(row(bits="W4A4")), row(bits="W3A3", ground="stressed")]  # a row without ground is of the plain one
    assert [(s.ground, s.bits) for s in missing(grid, rows)] == [("plain", "W3A3"), ("stressed", "W4A4")]
    for other in ({"num_val": 100}, {"num_calib": 16}, {"seed": 1}, {"options": {"a": 1}}, {"scope": "detector"}):
        assert missing([spec(**other)], [row()]) == [spec(**other)], other


def test_unknown_recipe_is_refused_with_the_near_one(capsys):
    assert accuracy.main(["--recipes", "minmx", "--dry-run"]) == 2
    assert "unknown value 'minmx'; did you mean 'minmax'?" in capsys.readouterr().err
    assert accuracy.main(["--recipes", "minmax", "--best", "apq", "--dry-run"]) == 2
    assert "--best: unknown value 'apq'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["--recipes", "repq"],
        ["--best"],
        ["--bits", "W2A4"],
        ["--detectors", "mask-rcnn"],
        ["--grounds", "plain"],
        ["--scopes", "backbone"],
        ["--num-calib", "16"],
        ["--cfg-options", "a=1"],
    ],
)
def test_ablations_refuse_what_chooses_runs_of_the_grid(words, capsys):
    assert accuracy.main(["--ablations", *words, "--dry-run"]) == 2
    assert f"{words[0]}: for runs of the grid" in capsys.readouterr().err


def test_options_are_those_of_every_run():
    options = {"model.quant.equalize": 0.5, "model.quant.search.grids.MatMul": [0.1, 1.2, 23]}
    words = ["model.quant.equalize=0.5", "model.quant.search.grids.MatMul=(0.1,1.2,23)"]  # lists in a row
    args = accuracy.parse_args(["--recipes", "minmax", "percentile", "--bits", "W3A3", "--cfg-options", *words])
    specs = accuracy.chosen_specs(args)
    assert {s.recipe for s in specs} == {"minmax", "percentile"}
    assert all(s.options == options for s in specs)


def test_dry_run_tells_number_and_time(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    append_row(out, row(calibration_seconds=0))
    choice = ["--detectors", "mask-rcnn", "--grounds", "plain", "--scopes", "backbone", "--bits", "W4A4", "W3A3"]
    assert accuracy.main([*choice, "--recipes", "minmax", "apq", "--out", str(out), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "mask-rcnn_plain_backbone_W3A3_minmax_32_0: 1.7 min"  # as the row: 100 s
    assert lines[-1] == "3 of 4 runs are missing: 0.0 h for 1, and 2 of unknown time"


def test_expected_time_is_linear_in_images_but_for_the_evaluation():
    rows = [row(calibration_seconds=0), row(bits="W3A3"), row(recipe="apq"), row(detector="cascade-mask-rcnn")]
    for changed, (calibration, whole) in zip(rows, [(32, 40), (64, 76), (999, 1999), (999, 1999)], strict=True):
        changed["calibration_seconds"], changed["seconds"] = calibration, whole
    # 1 and 2 s an image, and 8 and 12 s for the rest
    assert expected_seconds(spec(num_calib=64, bits="W8A8"), rows) == 64 * 1.5 + 10
    assert expected_seconds(spec(recipe="percentile"), rows) is None
    assert expected_seconds(spec(num_calib=16), [old(rows[0])]) == 16


# -- rows -----------------------------------------------------------------------------------------------------


def test_torn_line_is_dropped_and_its_run_repeated(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    whole, torn, later = row(bits="W4A4"), row(bits="W3A3"), row(bits="W8A8")
    append_row(out, whole)
    out.write_text(out.read_text() + json.dumps(torn)[:100])
    assert read_rows(out) == [whole]
    assert f"{out}:2: dropped a torn line" in capsys.readouterr().out
    append_row(out, later)
    assert read_rows(out) == [whole, later]
    assert missing([Spec.from_row(r) for r in (whole, torn, later)], read_rows(out)) == [Spec.from_row(torn)]


def test_a_failed_run_is_told_and_the_others_go_on(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    specs = [spec(bits=b) for b in ("W4A4", "W3A3", "W8A8")]
    calls = []

    def run(wanted, eval_float):
        calls.append((wanted.bits, eval_float))
        if wanted.bits == "W4A4":
            raise accuracy.RunFailedError("exit code 1, log in some/log.txt")
        return row(bits=wanted.bits, reference=(51.4, 51.5) if eval_float else None)

    assert accuracy.run_missing(specs, out, run) == specs[:1]
    assert calls == [("W4A4", True), ("W3A3", True), ("W8A8", False)]  # float AP until a row tells it
    assert "FAILED: exit code 1, log in some/log.txt" in capsys.readouterr().out
    assert [r["bits"] for r in read_rows(out)] == ["W3A3", "W8A8"]
    calls.clear()
    accuracy.run_missing(specs, out, run)
    assert calls == [("W4A4", False)]


def test_no_run_starts_after_the_limit(tmp_path, capsys):
    def run(wanted, eval_float):
        raise AssertionError("started")

    assert accuracy.run_missing([spec()], tmp_path / "rows.jsonl", run, limit_seconds=-1) == []
    assert "time is up, 1 runs are left" in capsys.readouterr().out


def test_first_val_images_hold_their_own_objects_only(tmp_path, monkeypatch):
    annotations = {
        "images": [{"id": 7}, {"id": 3}, {"id": 5}],
        "annotations": [{"id": 0, "image_id": 5}, {"id": 1, "image_id": 3}, {"id": 2, "image_id": 7}],
        "categories": [{"id": 1}],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/instances_val.json").write_text(json.dumps(annotations))
    monkeypatch.setattr(accuracy, "DATA", tmp_path)
    line = accuracy.command_line(spec(num_val=2), tmp_path / "run", tmp_path, eval_float=True)
    path = line[-1].removeprefix("test_evaluator.ann_file=")
    assert line[-2] == f"test_dataloader.dataset.ann_file={path}"
    small = json.loads(Path(path).read_text())
    assert [image["id"] for image in small["images"]] == [7, 3]
    assert [item["id"] for item in small["annotations"]] == [1, 2]
    assert small["categories"] == annotations["categories"]


def test_a_finished_run_is_made_again_from_the_start(tmp_path):
    assert "--resume" in accuracy.command_line(spec(), tmp_path, tmp_path, eval_float=False)
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "finished").touch()
    assert "--resume" not in accuracy.command_line(spec(), tmp_path, tmp_path, eval_float=False)


def quant_of(wanted, folder):
    line = accuracy.command_line(wanted, folder, folder, eval_float=False)
    return command.build_config(command.build_parser().parse_args(line)).model.quant.to_dict()


@pytest.mark.parametrize("wanted", [s for s in ablation_specs() if s.options], ids=lambda s: label(s.options))
def test_options_of_ablations_change_keys_that_the_recipe_has(wanted, tmp_path):
    changed, unchanged = quant_of(wanted, tmp_path), quant_of(replace(wanted, options={}), tmp_path)
    Recipe.from_dict(changed)
    for option in wanted.options:
        before, after = unchanged, changed
        for key in option.removeprefix("model.quant.").split("."):
            before, after = before.get(key, {}), after[key]
        assert after != before, option


def test_names_of_runs_differ():
    specs = [*make_grid(known_recipes(), best=["minmax"]), *ablation_specs(), spec(num_val=32)]
    assert len({s.name for s in specs}) == len([s for i, s in enumerate(specs) if s not in specs[:i]])
    many = [spec(options={f"model.quant.formats.{i}": "x" * 40 for i in range(20)} | {"last": n}) for n in (1, 2)]
    assert many[0].name != many[1].name
    assert {len(s.name) for s in many} == {200}


# -- report ---------------------------------------------------------------------------------------------------


def test_mean_and_spread():
    assert mean_and_spread([48.0]) == (48.0, None)
    assert mean_and_spread([48.0, 49.0, 47.6]) == (pytest.approx(48.2), pytest.approx(1.4))
    assert box_and_mask([row(48.04, 47.0)]) == "48.0 / 47.0"
    assert box_and_mask([row(48, 47), row(49, 47.3), row(47.6, 47)]) == "48.2 ± 1.4 / 47.1 ± 0.3"


def test_report_of_a_few_rows(tmp_path):
    shutil.copy(ROOT / "benchmarks/results/published_coco.json", tmp_path)
    statistics = {"median": {"norm1": 1.887}, "largest": {"norm1": 24.27}}
    (tmp_path / "difficulty_demo.json").write_text(json.dumps(statistics))
    base, module = BASE, ABLATIONS["metric"]["module"]
    rows = [
        old(row(48.1, 47.2, reference=(51.4, 51.5))),
        row(48.5, 47.4, seed=1),
        row(37.3, 34.3, bits="W3A3"),
        row(49.1, 48.2, recipe=base.recipe),
        row(50.3, 50.4, recipe="apq_pc_fast", ground="stressed", reference=(51.3, 51.4)),
        row(48.6, 48.3, recipe=module.recipe, options=module.options),
        row(20.0, 10.0, num_val=50),
        row(45.0, 44.0, options={"other": 1}),
        row(46.0, 44.2, options={"other": 1}, seed=1),
    ]
    page = render(rows, tmp_path)
    lines = page.splitlines()
    assert "* Machine: Abacus 1, threads: 1." in lines
    assert "* Machine: processor not recorded, threads: 1." in lines
    assert "* Versions: apq_mmdet 0.1.0, torch 2.13.0." in lines
    assert any(line.startswith("8 rows name the commit that made them") for line in lines)
    start = lines.index("## mask-rcnn, plain, scope `backbone`")
    assert lines[start + 4 : start + 9] == [
        "| recipe | images | W4A4 | W3A3 | seconds at W4A4 / W3A3 | peak memory |",
        "| --- | --- | --- | --- | --- | --- |",
        "| float |  | 51.4 / 51.5 | 51.4 / 51.5 |  |  |",
        "| `apq_fast` | 32 | 49.1 / 48.2 | - | 64 / - | 800 MiB |",
        "| `minmax` | 32 | 48.3 ± 0.4 / 47.3 ± 0.2 | 37.3 / 34.3 | 64 / 64 | 800 MiB |",
    ]
    start = lines.index("## mask-rcnn, stressed, scope `backbone`")
    assert lines[start + 6 : start + 8] == [
        "| float |  | 51.3 / 51.4 |  |  |",
        "| `apq_pc_fast` | 32 | 50.3 / 50.4 | 64 | 800 MiB |",
    ]
    start = lines.index("## mask-rcnn, plain, scope `backbone`, first 50 val images only")
    assert "| `minmax` | 32 | 20.0 / 10.0 | 64 | 800 MiB |" in lines[start : start + 9]
    assert "| metric | block (base) | 49.1 / 48.2 | +0.0 | +0.0 | 64 s | 800 MiB |" in lines
    assert "| metric | module | 48.6 / 48.3 | -0.5 | +0.1 | 64 s | 800 MiB |" in lines
    other = "mask-rcnn, plain, backbone, W4A4, `minmax` | other=1"
    assert f"| {other} | 45.5 ± 1.0 / 44.1 ± 0.2 | 64 s | 800 MiB |" in lines
    assert "| `norm1` | 1.89 / 24.3 |" in lines
    published = page[page.index("## Published, not measured here") :]
    assert "COCO val2017" in published
    assert "| APQ-ViT | 23.7 / 22.6 | 44.7 / 40.1 | 27.2 / 24.4 | 47.7 / 41.1 | I&S-ViT, Table 2 |" in published


def test_summary_names_the_best_other():
    ours = [row(51.3, 51.0, recipe="apq_plus"), row(51.5, 51.2, recipe="apq_plus", seed=1)]
    others = [row(51.4, 50.9, recipe="brecq"), row(51.2, 51.3, recipe="isvit"), row(48.0, 47.0, bits="W3A3")]
    others.append(row(48.0, 46.9, recipe="apq", bits="W3A3"))  # as good at boxes
    passed_over = [row(52, 52, recipe="few", num_calib=16), row(52, 52, num_val=50), row(52, 52, options={"a": 1})]
    without_ours = row(20, 10, ground="stressed")
    first = row(51.4, 51.5, recipe="apq_plus", bits="W8A8", reference=(51.4, 51.5))
    assert summary_table([*others, *ours, *passed_over, without_ours, first]).splitlines()[2:] == [
        "| mask-rcnn, plain, `backbone` | 51.4 / 51.5 | `apq_plus` | 51.4 / 51.5 | 51.4 ± 0.2 / 51.1 ± 0.2 | - |",
        "|  |  | best other | - | `brecq` 51.4 / `isvit` 51.3 | `minmax` 48.0 / 47.0 |",
    ]


def test_ablation_of_images_stays_out_of_the_comparison():
    usual, ablated = row(recipe="apq_fast"), row(recipe="apq_fast", num_calib=4)
    both = [row(recipe="apq_fast", num_calib=16), row(recipe="minmax", num_calib=16)]
    few = row(recipe="minmax", num_calib=2)
    assert compared([usual, ablated, *both, few]) == [usual, *both, few]


def test_committed_rows_give_a_report_and_plots(tmp_path):
    assert accuracy.main(["--report", "--docs", str(tmp_path)]) == 0
    assert "mask-rcnn, plain, scope `backbone`" in (tmp_path / "results.md").read_text()
    for name in ("ap_over_bits", "ap_over_time"):
        assert 5_000 < (tmp_path / f"images/{name}.png").stat().st_size < 150_000


def test_plots_of_no_rows_are_none(tmp_path):
    draw_plots([], tmp_path / "images")
    assert not (tmp_path / "images").exists()


def test_a_run_without_a_detection_has_no_ap(tmp_path):
    shutil.copy(ROOT / "benchmarks/results/published_coco.json", tmp_path)
    page = render([{**row(0, 0), "metrics": {}}], tmp_path)
    assert "| `minmax` | 32 | 0.0 / 0.0 |" in page
