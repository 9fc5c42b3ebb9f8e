import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import CHECKPOINT, ROOT
from mmdet.models.detectors import MaskRCNN
from mmdet.registry import HOOKS
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config
from mmengine.hooks import EMAHook

from apq_mmdet.calibration import Recipe
from apq_mmdet.engine import command
from apq_mmdet.engine.checkpoint import load_float_weights
from apq_mmdet.engine.float_config import build_model, read_config
from apq_mmdet.engine.ptq_loop import PTQLoop
from apq_mmdet.engine.quantized_config import load_recipe, quantized_config, standalone_config
from apq_mmdet.errors import BadInputError
from apq_mmdet.registry import MODELS

FLOAT = ROOT / "configs/demo/mask-rcnn_swin-demo.py"
LAZY = """
import torch.nn as nn
from mmcv.transforms import Resize
from my_necks import MyNeck
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs
from mmdet.models import L1Loss, MaskRCNN, RPNHead, SwinTransformer
from mmengine.dataset import pseudo_collate
from torch.optim import AdamW

default_scope = None
model = dict(
    type=MaskRCNN, backbone=dict(type=SwinTransformer, depths=(2, 2)), neck=dict(type=MyNeck, act=dict(type=nn.ReLU)),
    rpn_head=dict(type=RPNHead, loss_bbox=dict(type=L1Loss)),
)
test_dataloader = dict(
    collate_fn=dict(type=pseudo_collate),
    dataset=dict(pipeline=[dict(type=LoadAnnotations), dict(type=Resize), dict(type=PackDetInputs)]),
)
optim_wrapper = dict(optimizer=dict(type=AdamW))
"""


def test_classes_of_lazy_configs_become_names(tmp_path, monkeypatch):
    """mmengine writes their paths, of which it cannot read all again."""
    (tmp_path / "my_necks.py").write_text("from mmdet.models import FPN\n\n\nclass MyNeck(FPN):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "lazy.py").write_text(LAZY)
    made = standalone_config(quantized_config(read_config(str(tmp_path / "lazy.py")), "minmax", {}), [])
    (tmp_path / "written.py").write_text(made.pretty_text)
    again = Config.fromfile(tmp_path / "written.py")
    assert again.model.type == "apq_mmdet.MaskRCNN"
    assert again.model.backbone == dict(type="SwinTransformer", depths=(2, 2))
    assert again.model.rpn_head == dict(type="RPNHead", loss_bbox=dict(type="L1Loss"))
    assert again.model.neck == dict(type="my_necks.MyNeck", act=dict(type="ReLU"))  # the path says what to import
    steps = [step.type for step in again.test_dataloader.dataset.pipeline]
    assert steps == ["LoadAnnotations", "mmengine.Resize", "PackDetInputs"]  # mmdet has a Resize of its own
    assert not {"nn", "MyNeck", "Resize"} & set(again)
    assert again.test_dataloader.collate_fn.type == "pseudo_collate"
    assert again.optim_wrapper.optimizer.type == "AdamW"
    assert again.default_scope == "mmdet"


@pytest.mark.parametrize("recipe", [None, "apq"])
def test_a_recipe_beside_the_model_is_the_configs_own(recipe):
    cfg = Config.fromfile(FLOAT)
    cfg.quant = {**load_recipe("repq"), "a_bits": 6}
    quant = quantized_config(cfg, recipe, {}).model.quant
    assert (quant.recipe, quant.a_bits) == (recipe or "repq", 6)


def test_a_missing_pkg_resources_is_told_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    (tmp_path / "based.py").write_text("_base_ = 'mmdet::_base_/default_runtime.py'\n")
    with pytest.raises(BadInputError, match=r'based.py needs pkg_resources: pip install "setuptools<81"'):
        read_config(str(tmp_path / "based.py"))


def test_a_recipe_that_is_none_is_refused():
    cfg = Config.fromfile(FLOAT)
    cfg.quant = 4
    with pytest.raises(BadInputError, match="'quant' has to be a dict, got 4"):
        quantized_config(cfg, None, {})


def test_hooks_that_average_weights_are_left_out_wherever_they_stand(tmp_path):
    class Mine(EMAHook):
        pass

    cfg = Config.fromfile(FLOAT)
    cfg.custom_hooks = [dict(type=name) for name in ("Mine", "NumClassCheckHook", "EMAHook", "mmyolo.EMAHook")]
    cfg.default_hooks = dict(averaging=dict(type="EMAHook"), logger=dict(type="LoggerHook"), timer=None)
    HOOKS.register_module(module=Mine)
    try:
        made = quantized_config(cfg, "minmax", {})
    finally:
        HOOKS.module_dict.pop("Mine")
    assert [hook.type for hook in made.custom_hooks] == ["NumClassCheckHook"]
    assert list(made.default_hooks) == ["logger", "timer"]


def test_evaluation_keeps_its_precision_and_determinism(tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(f"_base_ = '{FLOAT}'\nrandomness = dict(deterministic=True)\ntest_cfg = dict(fp16=True)\n")
    args = command.build_parser().parse_args([str(config), "float.pth", "--work-dir", str(tmp_path), "--seed", "3"])
    made = command.build_config(args)
    assert made.randomness == dict(seed=3, deterministic=True)
    assert made.test_cfg.type == "apq_mmdet.PTQLoop"
    assert made.test_cfg.fp16 is True
    assert standalone_config(made, []).test_cfg == dict(type="TestLoop", fp16=True)
    assert standalone_config(Config.fromfile(FLOAT), []).test_cfg == dict(type="TestLoop")


def test_a_run_starts_from_its_float_checkpoint_alone(tmp_path):
    config = tmp_path / "trained.py"
    config.write_text(f"_base_ = '{FLOAT}'\nload_from = 'pretrained.pth'\nresume = True\n")
    args = command.build_parser().parse_args([str(config), "float.pth", "--work-dir", str(tmp_path)])
    made = command.build_config(args)
    assert (made.load_from, made.resume) == (None, False)
    assert made.test_cfg.checkpoint == "float.pth"


def test_nothing_that_was_for_the_run_alone_stays_in_the_config_that_it_leaves():
    cfg = quantized_config(Config.fromfile(FLOAT), "minmax", {})
    wrapper = dict(type="MMDistributedDataParallel", device_ids=None)
    run = dict(load_from="a.pth", resume=True, launcher="slurm", work_dir="there", model_wrapper_cfg=wrapper)
    cfg.merge_from_dict(run)
    made = standalone_config(cfg, [])
    assert (made.load_from, made.resume, made.launcher) == (None, False, "none")
    assert not {"work_dir", "model_wrapper_cfg"} & set(made)


def test_numbers_that_an_evaluation_asks_for_stay_its_own():
    metric = dict(type="CocoMetric", metric=["bbox"], metric_items=["mAP"])
    made = quantized_config(Config(dict(model=dict(type="MaskRCNN"), test_evaluator=metric)), "minmax", {})
    assert made.test_evaluator.metric_items == ["mAP"]
    metric = dict(type="CocoMetric", metric=["bbox"], proposal_nums=(1, 10))
    made = quantized_config(Config(dict(model=dict(type="MaskRCNN"), test_evaluator=metric)), "minmax", {})
    assert "metric_items" not in made.test_evaluator  # mmdet could not tell which is which


def test_layers_without_data_are_written_down_beside_those_of_before():
    cfg = quantized_config(Config.fromfile(FLOAT), "minmax", {})
    once = standalone_config(cfg, ["a", "b"])
    twice = standalone_config(once, ["c"]).model.quant.overrides
    assert [rule.pattern for rule in twice.values()] == ["a", "b", "c"]


def test_layers_without_data_stay_float_whatever_other_rules_are_called():
    overrides = dict(zeta=dict(pattern="backbone.*", input=dict(bits=8)), alpha=dict(pattern="*", weight=dict(bits=6)))
    cfg = quantized_config(Config.fromfile(FLOAT), "minmax", dict(overrides=overrides))
    written = standalone_config(cfg, ["backbone.fc"]).model.quant
    policy = Recipe.from_dict(Config.fromstring(Config(dict(quant=written)).pretty_text, ".py").quant).policy
    assert policy.scheme("backbone.fc", "Linear", ("weight", "input"))[0] == {}
    other = policy.scheme("backbone.other", "Linear", ("weight", "input"))[0]
    assert {role: spec.bits for role, spec in other.items()} == {"weight": 6, "input": 8}


def test_imports_that_may_fail_still_may():
    cfg = Config.fromfile(FLOAT)
    cfg.custom_imports = dict(imports=["not_there"], allow_failed_imports=True)
    written = standalone_config(cfg, []).custom_imports
    assert written == dict(imports=["apq_mmdet", "not_there"], allow_failed_imports=True)


def test_a_single_import_can_be_given_as_text():
    cfg = Config.fromfile(FLOAT)
    cfg.custom_imports = dict(imports="mine")
    assert standalone_config(cfg, []).custom_imports == dict(imports=["apq_mmdet", "mine"])


def test_detectors_that_are_registered_later_have_a_quantized_variant():
    class LaterMaskRCNN(MaskRCNN):
        pass

    MMDET_MODELS.register_module(module=LaterMaskRCNN)
    try:
        assert issubclass(MODELS.get("apq_mmdet.LaterMaskRCNN"), LaterMaskRCNN)
        assert issubclass(MMDET_MODELS.get("apq_mmdet.LaterMaskRCNN"), LaterMaskRCNN)
    finally:
        for registry in (MODELS, MMDET_MODELS):
            registry.module_dict.pop("LaterMaskRCNN", None)
    assert MODELS.get("apq_mmdet.NoMaskRCNN") is None


def test_a_detector_that_is_replaced_has_a_new_quantized_variant():
    class Replacement(MaskRCNN):
        pass

    before = MODELS.get("apq_mmdet.MaskRCNN")
    MMDET_MODELS.register_module(name="MaskRCNN", module=Replacement, force=True)
    try:
        assert issubclass(MODELS.get("apq_mmdet.MaskRCNN"), Replacement)
    finally:
        MMDET_MODELS.register_module(name="MaskRCNN", module=MaskRCNN, force=True)
    assert MODELS.get("apq_mmdet.MaskRCNN").__bases__ == before.__bases__


def test_a_users_own_quantized_variant_stays():
    class Own(MODELS.get("apq_mmdet.MaskRCNN")):
        pass

    before = MODELS.get("apq_mmdet.MaskRCNN")
    MODELS.register_module(name="MaskRCNN", module=Own, force=True)
    try:
        assert MODELS.get("apq_mmdet.MaskRCNN") is Own
    finally:
        MODELS.register_module(name="MaskRCNN", module=before, force=True)


def test_a_preprocessors_buffers_of_old_checkpoints_do_not_count(tmp_path):
    model = MMDET_MODELS.build(Config.fromfile(FLOAT).model)
    content = torch.load(CHECKPOINT, weights_only=True)
    content["state_dict"] |= {f"data_preprocessor.{name}": torch.zeros(3, 1, 1) for name in ("mean", "std")}
    torch.save({**content, "meta": None}, tmp_path / "old.pth")
    assert load_float_weights(model, str(tmp_path / "old.pth")) == {}
    assert torch.equal(model.state_dict()["backbone.norm0.weight"], content["state_dict"]["backbone.norm0.weight"])


@pytest.mark.parametrize("meta", ["text", ["a", "list"], 3])
def test_a_meta_that_is_no_dict_says_nothing(tmp_path, meta):
    torch.save({"meta": meta, "state_dict": {"weight": torch.zeros(1, 1)}}, tmp_path / "odd.pth")
    assert load_float_weights(torch.nn.Linear(1, 1, bias=False), str(tmp_path / "odd.pth")) == {}


def test_a_preprocessor_beside_the_model_is_the_models_where_that_has_none():
    """As for mmengine's Runner."""
    cfg = Config.fromfile(FLOAT)
    own = dict(cfg.model.pop("data_preprocessor"), mean=[1.0, 2.0, 3.0])
    cfg.data_preprocessor = own
    made = standalone_config(quantized_config(cfg, "minmax", {}), [])
    assert made.model.data_preprocessor == own
    assert "data_preprocessor" not in made
    assert build_model(cfg).data_preprocessor.mean.flatten().tolist() == [1, 2, 3]
    assert "data_preprocessor" not in cfg.model
    cfg.model.data_preprocessor = dict(own, mean=[4.0, 5.0, 6.0])
    assert quantized_config(cfg, "minmax", {}).model.data_preprocessor.mean == [4, 5, 6]
    assert build_model(cfg).data_preprocessor.mean.flatten().tolist() == [4, 5, 6]


def test_class_names_of_an_mmdet_2_checkpoint_are_kept():
    loop = SimpleNamespace(float_meta=dict(CLASSES=("cat", "dog"), epoch=12), evaluate=False, eval_float=False)
    assert PTQLoop._dataset_meta(loop) == dict(classes=("cat", "dog"))
