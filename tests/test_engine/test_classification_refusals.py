import re
import shutil
from pathlib import Path

import pytest
import torch
from small_classifiers import CLASSES, VIT, arguments, options

from apq_mmdet.engine import classification
from apq_mmdet.engine.classification import build_classifier, load_classifier
from apq_mmdet.engine.classification_command import main
from apq_mmdet.errors import BadInputError


@pytest.fixture
def few(folders, tmp_path) -> Path:
    """One image of each class, in folders that a test may damage."""
    for name in CLASSES:
        (tmp_path / "few" / name).mkdir(parents=True)
        shutil.copy(folders / "train" / name / "000.png", tmp_path / "few" / name)
    return tmp_path / "few"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--w-bits", 9], "--w-bits: bits must be a whole number from 2 to 8, got 9"),
        (["--recipe", "aqp"], "did you mean 'apq'"),
        (["--checkpoint", "none.pth"], "checkpoint none.pth does not exist"),
        (["--num-calib", 0], "num_calib must be at least 1"),
        (["--num-calib", 999], "999 calibration images asked for, folder .* holds 240"),
        (["--calib-dir", "nowhere"], "calibration folder nowhere does not exist"),
        (["--val-dir", "nowhere"], "image folder nowhere does not exist"),
        (["--val-dir", "{folders}/val/circle"], "circle holds no class folders"),
        (["--calib-dir", "{folders}/val"], "4 of 4 calibration images are evaluated images"),
        (["--val-dir", "{folders}"], "image folder .* has 2 classes, vit_small_patch16_224 has 4"),
        (["--class-list", "none.txt"], "class list none.txt cannot be read"),
        (["--class-list", "{folders}/three.txt"], "'stripes' is not in the class list"),
        (["--class-list", "{folders}/five.txt"], "class list .* has 5 classes, vit_small_patch16_224 has 4"),
        (["--class-list", "{folders}/twice.txt"], "holds 'cross' twice"),
        (["--model-args", "depth=3"], "another architecture than the model: it lacks blocks"),
        (["--model-args", "dept=2"], "timm cannot build vit_small_patch16_224 with .*dept"),
        (["--model-args", "num_classes=0"], "gives no class scores"),
        (["--cfg-options", "quant.overrides.mine.pattern=*.qvk"], r"'\*\.qvk'.*matches no layer"),
        (["--cfg-options", "quant.searsh.rounds=1"], "quant.*'searsh'.*did you mean 'search'"),
        (["--recipe", "apq", "--cfg-options", "quant.search.grids.MatMul=(0.1,0.5,4)"], "holds no range factor"),
        (["--cfg-options", "w_bits=2"], "w_bits would change nothing here: write quant.w_bits"),
        (["--cfg-options", "model.quant.w_bits=2"], "write quant.w_bits"),
        (["--cfg-options", "quant=5"], "would change nothing here"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--workers", -1], "--workers must be at least 0, got -1"),
        (["--device", "tpu"], "--device must be"),
    ],
    ids=str,
)
def test_refused_options(folders, classifiers, tmp_path, capsys, more, message):
    lists = {"three": CLASSES[:3], "five": (*CLASSES, "more"), "twice": (*CLASSES, "cross")}
    for name, classes in lists.items():
        (folders / f"{name}.txt").write_text("\n".join(classes))
    more = [str(option).replace("{folders}", str(folders)) for option in more]
    assert main(options(folders, classifiers, tmp_path / "work", *more)) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch16_224", "knows no model 'vit_smal_patch16_224'; did you mean 'vit_small_patch16_224'"),
        ("vit_small_patch16_224.none", r"cannot build vit_small_patch16_224\.none: .*tag"),
        ("hf-hub:timm/vit_small_patch16_224", "knows no model 'hf-hub:"),
    ],
)
def test_unknown_models(name, message):
    with pytest.raises(BadInputError, match=message):
        build_classifier(name, {})


@pytest.mark.parametrize(("content", "name"), [(b"", "empty.png"), (b"no image", "text.jpg")])
def test_files_that_are_no_images(folders, classifiers, few, tmp_path, capsys, content, name):
    (few / "cross" / name).write_bytes(content)
    assert main(options(folders, classifiers, tmp_path / "work", "--val-dir", few)) == 2
    assert re.search(f"evaluation image .*{name} cannot be read", capsys.readouterr().err)
    line = options(folders, classifiers, tmp_path / "work", "--calib-dir", few, "--num-calib", 5)
    assert main(line) == 2
    assert re.search(f"calibration image .*{name} cannot be read", capsys.readouterr().err)


def test_a_class_without_images(folders, classifiers, few, tmp_path, capsys):
    (few / CLASSES[0] / "000.png").unlink()
    assert main(options(folders, classifiers, tmp_path / "work", "--val-dir", few)) == 2
    assert re.search("class folder .*circle holds no images", capsys.readouterr().err)


def test_weights_of_another_patch_size(folders, tmp_path, capsys):
    small = dict(embed_dim=12, depth=1, num_heads=2, num_classes=len(CLASSES))
    torch.save(build_classifier(VIT, {**small, "patch_size": 32}).state_dict(), tmp_path / "patch32.pth")
    line = [VIT, "--checkpoint", tmp_path / "patch32.pth", "--calib-dir", folders / "train", "--no-eval"]
    line += ["--work-dir", tmp_path / "work", "--model-args", *(f"{key}={value}" for key, value in small.items())]
    assert main(list(map(str, line))) == 2
    assert "has other sizes of pos_embed, patch_embed.proj.weight" in capsys.readouterr().err


def test_a_detector_is_no_classifier(tmp_path):
    torch.save({"meta": {"apq_mmdet": {"seed": 0}}, "state_dict": {}}, tmp_path / "quantized.pth")
    with pytest.raises(BadInputError, match="no quantized classifier"):
        load_classifier(tmp_path)


def test_downloads_are_timms_and_asked_for(monkeypatch):
    asked = []
    timm = classification.import_timm()
    create = timm.create_model

    def fake(name, pretrained=False, **model_args):
        asked.append(pretrained)
        if pretrained:
            raise OSError("no network")
        return create(name, **model_args)

    monkeypatch.setattr(timm, "create_model", fake)
    build_classifier(VIT, arguments(VIT))
    with pytest.raises(BadInputError, match="cannot build vit_small_patch16_224: no network"):
        build_classifier(VIT, {}, pretrained=True)
    with pytest.raises(BadInputError, match="last layer's weights would be random"):
        build_classifier(VIT, {"num_classes": 4}, pretrained=True)
    assert asked == [False, True]


def test_a_work_dir_that_cannot_be_made(folders, classifiers, capsys):
    assert main(options(folders, classifiers, "/proc/none/work", "--no-eval")) == 2
    assert "--work-dir: /proc/none/work/calibration cannot be written to: " in capsys.readouterr().err


def test_what_a_run_reads_is_not_overwritten(folders, classifiers, tmp_path, capsys):
    own = tmp_path / "quantized.pth"
    own.write_bytes(classifiers[VIT].read_bytes())
    assert main(options(folders, {VIT: own}, tmp_path)) == 2
    assert f"the run would overwrite {own}" in capsys.readouterr().err
    assert own.read_bytes() == classifiers[VIT].read_bytes()
