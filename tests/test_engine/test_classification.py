import argparse
import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT
from PIL import Image
from torch import nn

from apq_mmdet.datasets.image_folder import FolderImages, ImageFolder, read_class_list
from apq_mmdet.engine import classification, classification_command
from apq_mmdet.engine.classification import (
    LogitsTask,
    build_classifier,
    data_config,
    evaluate,
    load_classifier,
    load_weights,
    make_transform,
)
from apq_mmdet.engine.classification_command import ClassificationRun, build_parser, main
from apq_mmdet.errors import BadInputError
from apq_mmdet.layers import quantize_model
from apq_mmdet.policy import Policy

CLASSES = ("circle", "cross", "square", "stripes")
SIZE = 32
VIT, SWIN = "vit_small_patch16_224", "swin_tiny_patch4_window7_224"
MODELS = {
    VIT: dict(img_size=SIZE, patch_size=8, embed_dim=32, depth=2, num_heads=2),
    SWIN: dict(img_size=SIZE, window_size=4, embed_dim=16, depths=(2, 1), num_heads=(1, 2)),
}
PAPER = (
    *("vit_small_patch16_224", "vit_base_patch16_224"),
    *("deit_tiny_patch16_224", "deit_small_patch16_224", "deit_base_patch16_224"),
    *("swin_tiny_patch4_window7_224", "swin_small_patch4_window7_224", "swin_base_patch4_window7_224"),
)


def draw(label: int, rng: np.random.Generator) -> np.ndarray:
    """One RGB image [SIZE, SIZE, 3]: a shape of random place, size and colour on noise."""
    image = rng.integers(0, 90, (SIZE, SIZE, 3)).astype(np.uint8)
    colour = rng.integers(120, 256, 3).tolist()
    radius = int(rng.integers(6, 11))
    x, y = rng.integers(radius, SIZE - radius, 2).tolist()
    corners = (x - radius, y - radius), (x + radius, y + radius)
    if label == 0:
        cv2.circle(image, (x, y), radius, colour, -1)
    elif label == 1:
        cv2.line(image, (x - radius, y), (x + radius, y), colour, 3)
        cv2.line(image, (x, y - radius), (x, y + radius), colour, 3)
    elif label == 2:
        cv2.rectangle(image, *corners, colour, 2)
    else:
        image[corners[0][1] : corners[1][1] : 4, corners[0][0] : corners[1][0]] = colour
    return image


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """``train`` and ``val``, each with a folder for every class."""
    root = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(0)
    for split, number in (("train", 60), ("val", 25)):
        for label, name in enumerate(CLASSES):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(number):
                Image.fromarray(draw(label, rng)).save(folder / f"{index:03d}.png")
    return root


def train(name: str, root: Path) -> dict:
    torch.manual_seed(0)
    model = build_classifier(name, arguments(name)).train()
    images = ImageFolder(root / "train", make_transform(data_config(model, arguments(name))))
    x, y = (torch.stack(part) for part in zip(*((x, torch.tensor(y)) for x, y in images), strict=True))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, 120)
    for _ in range(120):
        chosen = torch.randint(len(x), (48,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


def arguments(name: str) -> dict:
    return dict(MODELS[name], num_classes=len(CLASSES))


def options(tree: Path, checkpoints: dict, work_dir: Path, *more, name: str = VIT) -> list[str]:
    """Of the command, for a small model; those given last count."""
    listed = {k: ",".join(map(str, v)) if isinstance(v, tuple) else v for k, v in arguments(name).items()}
    given = [name, "--checkpoint", checkpoints[name], "--work-dir", work_dir, "--calib-dir", tree / "train"]
    given += ["--val-dir", tree / "val", "--num-calib", 4, "--workers", 0, "--device", "cpu", "--recipe", "minmax"]
    given += ["--model-args", *(f"{key}={value}" for key, value in listed.items()), *more]
    return [str(option) for option in given]


def made(*args, **kwargs) -> ClassificationRun:
    return ClassificationRun(build_parser().parse_args(options(*args, **kwargs)))


@pytest.fixture(scope="module")
def checkpoints(tree) -> dict[str, Path]:
    """A trained checkpoint of each model."""
    paths = {}
    for name in MODELS:
        paths[name] = tree / f"{name}.pth"
        torch.save({"state_dict": train(name, tree), "args": argparse.Namespace(lr=1e-3)}, paths[name])
    return paths


# -- data -----------------------------------------------------------------------------------------------------


def touch(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(path)


def test_folders_are_read_as_torchvision_reads_them(tmp_path):
    from torchvision.datasets import ImageFolder as Torchvisions

    root = tmp_path / "root"
    touch(*(root / name for name in ("b10/1.png", "b10/z/2.JPEG", "b10/a/3.jpg", "b9/10.png", "b9/9.png", "B/x.bmp")))
    (root / "b9" / "notes.txt").write_text("no image")
    (root / "linked").symlink_to(root / "b9")
    own, other = ImageFolder(root, lambda image: image), Torchvisions(str(root))
    assert own.classes == other.classes == ["B", "b10", "b9", "linked"]
    assert own.samples == other.samples
    assert own[0][0].size == (6, 4)


def test_a_class_list_gives_the_order(tmp_path):
    touch(tmp_path / "root" / "a" / "1.png", tmp_path / "root" / "c" / "1.png")
    (tmp_path / "classes.txt").write_text("c\n\nb\na\n")
    classes = read_class_list(tmp_path / "classes.txt")
    images = ImageFolder(tmp_path / "root", lambda image: image, classes)
    assert images.classes == ["c", "b", "a"]
    assert [label for _, label in images.samples] == [2, 0]


def test_calibration_images_are_drawn_from_subfolders_too(tree):
    transform = make_transform({"input_size": (3, SIZE, SIZE), "crop_pct": 1.0})
    images = FolderImages(tree / "train", 5, 0, transform)
    assert images[0].shape == (1, 3, SIZE, SIZE)
    assert len({Path(name).parent.name for name in images.ids}) > 1
    assert images.ids == FolderImages(tree / "train", 5, 0, transform).ids
    assert images.ids != FolderImages(tree / "train", 5, 1, transform).ids


# -- models ---------------------------------------------------------------------------------------------------


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


def test_images_of_the_patch_embedding_keep_8_bits_as_mmdets_do(tree, checkpoints, tmp_path):
    run = made(tree, checkpoints, tmp_path, "--no-eval", "--w-bits", 4, "--a-bits", 4)
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


# -- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=MODELS)
def runs(request, tree, checkpoints, tmp_path_factory) -> dict[int, ClassificationRun]:
    """Finished runs of a model by their bits."""
    finished = {}
    for bits in (8, 4):
        work_dir = tmp_path_factory.mktemp(f"{request.param}_{bits}")
        more = ["--w-bits", bits, "--a-bits", bits, "--eval-float", "--recipe", "apq_plus"]
        finished[bits] = made(tree, checkpoints, work_dir, *more, name=request.param)
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
def test_loaded_classifiers_give_the_same_scores(runs, tree, bits):
    run = runs[bits]
    loaded = load_classifier(run.work_dir)
    assert loaded.classes == list(CLASSES)
    assert not loaded.model.training
    with Image.open(tree / "val" / "cross" / "000.png") as image:
        x = loaded.transform(image.convert("RGB"))[None]
    assert torch.equal(x[0], run.evaluated[25][0])
    with torch.no_grad():
        assert torch.equal(loaded.model(x), run.model(x))
    again = evaluate(load_classifier(run.work_dir / "quantized.pth").model, run.evaluated, 64, 0, "again")
    assert again == report_of(run)["metrics"]["quantized"]


def test_the_documented_way_to_load(runs, tree):
    """The code in docs/classification.md, run as it is printed."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "classification.md").read_text(), re.DOTALL)[1]
    image = tree / "val" / "square" / "003.png"
    code = code.replace('"DIR"', repr(str(runs[4].work_dir))).replace('"image.jpg"', repr(str(image)))
    exec(code, found := {})
    with torch.no_grad():
        assert torch.equal(found["scores"], runs[4].model(runs[4].evaluated[53][0][None]))


def test_quantized_weights_are_not_the_float_ones(runs):
    state = torch.load(runs[4].work_dir / "quantized.pth", weights_only=True)["state_dict"]
    assert "patch_embed.proj.weight_codes" in state
    assert "patch_embed.proj.weight" not in state


def test_quantizing_twice_is_refused(runs, tree, checkpoints, tmp_path, capsys):
    again = ["--checkpoint", runs[4].work_dir / "quantized.pth"]
    assert main(options(tree, checkpoints, tmp_path, *again, name=runs[4].args.model)) == 2
    assert "already quantized" in capsys.readouterr().err


class KilledError(BaseException):
    """As if the process had ended here."""


def test_killed_and_resumed_gives_the_same_bytes(tree, checkpoints, tmp_path, monkeypatch):
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
            main(options(tree, checkpoints, tmp_path / "killed", *recipe))
    assert main(options(tree, checkpoints, tmp_path / "killed", *recipe, "--resume")) == 0
    assert main(options(tree, checkpoints, tmp_path / "whole", *recipe)) == 0
    blocks = json.loads((tmp_path / "killed" / "report.json").read_text())["blocks"]
    assert [block["resumed"] for block in blocks] == [True, True, False, False]
    a, b = ((tmp_path / name / "quantized.pth").read_bytes() for name in ("killed", "whole"))
    assert a == b
    assert main(options(tree, checkpoints, tmp_path / "killed", *recipe, "--resume", "--seed", 1)) == 2


def test_a_run_without_evaluation(tree, checkpoints, tmp_path, capsys):
    line = options(tree, checkpoints, tmp_path, "--no-eval")
    position = line.index("--val-dir")
    assert main(line[:position] + line[position + 2 :]) == 0
    assert "float not measured | quantized not measured" in capsys.readouterr().out
    assert load_classifier(tmp_path).classes is None


def test_folders_of_some_of_the_classes(tree, checkpoints, tmp_path):
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "square").symlink_to(tree / "val" / "square")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    more = ["--val-dir", tmp_path / "val", "--class-list", tmp_path / "classes.txt"]
    assert main(options(tree, checkpoints, tmp_path / "work", *more)) == 0
    assert json.loads((tmp_path / "work" / "report.json").read_text())["metrics"]["quantized"]["top1"] > 50


# -- refusals -------------------------------------------------------------------------------------------------


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
        (["--val-dir", "{tree}/val/circle"], "circle holds no class folders"),
        (["--calib-dir", "{tree}/val"], "4 of 4 calibration images are evaluated images"),
        (["--val-dir", "{tree}"], "image folder .* has 2 classes, vit_small_patch16_224 has 4"),
        (["--class-list", "none.txt"], "class list none.txt cannot be read"),
        (["--class-list", "{tree}/three.txt"], "'stripes' is not in the class list"),
        (["--class-list", "{tree}/five.txt"], "class list .* has 5 classes, vit_small_patch16_224 has 4"),
        (["--class-list", "{tree}/twice.txt"], "holds 'cross' twice"),
        (["--model-args", "depth=3"], "another architecture than the model: it lacks blocks"),
        (["--model-args", "dept=2"], "timm cannot build vit_small_patch16_224 with .*dept"),
        (["--model-args", "num_classes=0"], "gives no class scores"),
        (["--cfg-options", "quant.overrides.mine.pattern=*.qvk"], r"'\*\.qvk'.*matches no layer"),
        (["--cfg-options", "quant.searsh.rounds=1"], "quant.*'searsh'.*did you mean 'search'"),
        (["--batch-size", 0], "--batch-size must be at least 1, got 0"),
        (["--workers", -1], "--workers must be at least 0, got -1"),
        (["--device", "tpu"], "--device must be"),
    ],
    ids=str,
)
def test_refused_options(tree, checkpoints, tmp_path, capsys, more, message):
    lists = {"three": CLASSES[:3], "five": (*CLASSES, "more"), "twice": (*CLASSES, "cross")}
    for name, classes in lists.items():
        (tree / f"{name}.txt").write_text("\n".join(classes))
    more = [str(option).replace("{tree}", str(tree)) for option in more]
    assert main(options(tree, checkpoints, tmp_path / "work", *more)) == 2
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
def test_files_that_are_no_images(tree, checkpoints, tmp_path, capsys, content, name):
    touch(*(tmp_path / "root" / c / "1.png" for c in CLASSES))
    (tmp_path / "root" / "cross" / name).write_bytes(content)
    assert main(options(tree, checkpoints, tmp_path / "work", "--val-dir", tmp_path / "root")) == 2
    assert re.search(f"evaluation image .*{name} cannot be read", capsys.readouterr().err)
    line = options(tree, checkpoints, tmp_path / "work", "--calib-dir", tmp_path / "root", "--num-calib", 5)
    assert main(line) == 2
    assert re.search(f"calibration image .*{name} cannot be read", capsys.readouterr().err)


def test_a_class_without_images(tree, checkpoints, tmp_path, capsys):
    touch(*(tmp_path / "root" / c / "1.png" for c in CLASSES[1:]))
    (tmp_path / "root" / CLASSES[0]).mkdir()
    assert main(options(tree, checkpoints, tmp_path / "work", "--val-dir", tmp_path / "root")) == 2
    assert re.search("class folder .*circle holds no images", capsys.readouterr().err)


def test_an_image_that_breaks_off_names_itself(tmp_path):
    path = tmp_path / "root" / "a" / "1.jpg"
    touch(path)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-1000])
    images = ImageFolder(tmp_path / "root", lambda image: image)
    with pytest.raises(RuntimeError, match=r"1\.jpg cannot be decoded"):
        images[0]


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
