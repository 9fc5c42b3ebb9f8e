import json
import re

import pytest
import torch
from helpers import ROOT
from PIL import Image
from small_classifiers import CLASSES, MODELS, made, options

from apq_mmdet.engine import classification_command
from apq_mmdet.engine.classification import evaluate, load_classifier
from apq_mmdet.engine.classification_command import ClassificationRun, main
from apq_mmdet.layers import quantizers_of


@pytest.fixture(scope="module", params=MODELS)
def runs(request, folders, classifiers, tmp_path_factory) -> dict[int, ClassificationRun]:
    """Finished runs of a model by their bits."""
    finished = {}
    for bits in (8, 4):
        work_dir = tmp_path_factory.mktemp(f"{request.param}_{bits}")
        more = ["--w-bits", bits, "--a-bits", bits, "--eval-float", "--recipe", "apq_plus"]
        finished[bits] = made(folders, classifiers, work_dir, *more, name=request.param)
        finished[bits].run()
    return finished


def report_of(run):
    return json.loads((run.work_dir / "report.json").read_text())


def test_accuracy_of_quantized_models(runs):
    top1 = {bits: report_of(run)["metrics"]["quantized"]["top1"] for bits, run in runs.items()}
    before = report_of(runs[8])["metrics"]["float"]["top1"]
    assert before > 100 / len(CLASSES) + 30
    assert abs(top1[8] - before) <= 3
    assert top1[4] > 100 / len(CLASSES) + 20


def test_what_a_report_says(runs):
    report = report_of(runs[4])
    assert report["metrics"]["float"].keys() == {"top1"}  # of four classes the best five are all
    assert report["evaluated_images"] == 25 * len(CLASSES)
    assert len(set(report["calibration_images"])) == 4
    assert report["bits"] == {"weight": 4, "activation": 4}
    assert report["versions"].keys() >= {"torch", "timm", "apq_mmdet"}
    assert {block["block"] for block in report["blocks"]} >= {"patch_embed"}
    products = [row for row in report["layers"] if row["kind"] == "MatMul"]
    assert {row["role"] for row in products if row["bits"] == 4} == {"query", "key", "attention", "value"}
    weights = sum(row["elements"] for row in report["layers"] if row["bits"] and row["role"] == "weight")
    sizes = [report_of(runs[bits])["sizes"]["quantized_checkpoint_bytes"] for bits in (8, 4)]
    assert sizes[0] - sizes[1] == pytest.approx(weights / 2, rel=0.05)


@pytest.mark.parametrize("bits", [8, 4])
def test_loaded_classifiers_give_the_same_scores(runs, folders, bits):
    run = runs[bits]
    loaded = load_classifier(run.work_dir)
    assert loaded.classes == list(CLASSES)
    assert not loaded.model.training
    with Image.open(folders / "val" / "cross" / "000.png") as image:
        x = loaded.transform(image.convert("RGB"))[None]
    assert torch.equal(x[0], run.evaluated[25][0])
    with torch.no_grad():
        assert torch.equal(loaded.model(x), run.model(x))
    again = evaluate(load_classifier(run.work_dir / "quantized.pth").model, run.evaluated, 64, 0, "again")
    assert again == report_of(run)["metrics"]["quantized"]


def test_layers_that_were_left_float_are_so_in_a_loaded_classifier(runs, tmp_path):
    run = runs[4]
    content = torch.load(run.work_dir / "quantized.pth", weights_only=True)
    name = next(row.layer for row in reversed(run.table) if row.role == "weight" and row.bits)  # the head
    state = content["state_dict"]
    for key in [key for key in state if key.startswith(f"{name}.") and not key.endswith("bias")]:
        del state[key]
    state[f"{name}.weight"] = run.model.get_submodule(name).weight.data
    content["meta"]["apq_mmdet"]["left_float"] = [name]
    torch.save(content, tmp_path / "quantized.pth")
    assert not any(q for q in quantizers_of(load_classifier(tmp_path).model.get_submodule(name)))
    assert len(quantizers_of(load_classifier(tmp_path).model)) == len(quantizers_of(run.model)) - 2


def test_the_documented_way_to_load(runs, folders):
    """The code in docs/classification.md, run as it is printed."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "classification.md").read_text(), re.DOTALL)[1]
    image = folders / "val" / "square" / "003.png"
    code = code.replace('"DIR"', repr(str(runs[4].work_dir))).replace('"image.jpg"', repr(str(image)))
    exec(code, found := {})
    with torch.no_grad():
        assert torch.equal(found["scores"], runs[4].model(runs[4].evaluated[53][0][None]))


def test_quantized_weights_are_not_the_float_ones(runs):
    state = torch.load(runs[4].work_dir / "quantized.pth", weights_only=True)["state_dict"]
    assert "patch_embed.proj.weight_codes" in state
    assert "patch_embed.proj.weight" not in state


def test_quantizing_twice_is_refused(runs, folders, classifiers, tmp_path, capsys):
    again = ["--checkpoint", runs[4].work_dir / "quantized.pth"]
    assert main(options(folders, classifiers, tmp_path, *again, name=runs[4].args.model)) == 2
    assert "already quantized" in capsys.readouterr().err


class KilledError(BaseException):
    """As if the process had ended here."""


def test_killed_and_resumed_gives_the_same_bytes(folders, classifiers, tmp_path, monkeypatch):
    recipe = ["--recipe", "apq_plus", "--w-bits", 4, "--no-eval"]
    save, saved = classification_command.BlockStatesOnDisk.save, []

    def die(self, block, finished):
        save(self, block, finished)
        saved.append(block)
        if len(saved) == 2:
            raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(classification_command.BlockStatesOnDisk, "save", die)
        with pytest.raises(KilledError):
            main(options(folders, classifiers, tmp_path / "killed", *recipe))
    assert main(options(folders, classifiers, tmp_path / "killed", *recipe, "--resume")) == 0
    assert main(options(folders, classifiers, tmp_path / "whole", *recipe)) == 0
    report = json.loads((tmp_path / "killed" / "report.json").read_text())
    assert [block["resumed"] for block in report["blocks"]] == [True, True, False, False]
    earlier = sum(block["seconds"] for block in report["blocks"] if block["resumed"])
    assert 0 < earlier < report["calibration_seconds"] < report["seconds"]
    a, b = ((tmp_path / name / "quantized.pth").read_bytes() for name in ("killed", "whole"))
    assert a == b
    assert main(options(folders, classifiers, tmp_path / "killed", *recipe, "--resume", "--seed", 1)) == 2


def test_a_run_without_evaluation(folders, classifiers, tmp_path, capsys):
    line = options(folders, classifiers, tmp_path, "--no-eval")
    position = line.index("--val-dir")
    assert main(line[:position] + line[position + 2 :]) == 0
    assert "float not measured | quantized not measured" in capsys.readouterr().out
    assert load_classifier(tmp_path).classes is None


def test_folders_of_some_of_the_classes(folders, classifiers, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "square").symlink_to(folders / "val" / "square")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    more = ["--val-dir", tmp_path / "val", "--class-list", tmp_path / "classes.txt"]
    assert main(options(folders, classifiers, tmp_path / "work", *more)) == 0
    assert json.loads((tmp_path / "work" / "report.json").read_text())["metrics"]["quantized"]["top1"] > 50


def test_a_finished_run_may_be_repeated(folders, classifiers, tmp_path):
    run = made(folders, classifiers, tmp_path, "--no-eval")
    run.states.save("patch_embed", {})  # min-max keeps none of its own
    run.run()
    again = made(folders, classifiers, tmp_path, "--no-eval")  # else it would have to be resumed or deleted
    assert again.states.load("patch_embed") is None
