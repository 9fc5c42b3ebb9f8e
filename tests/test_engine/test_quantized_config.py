from types import SimpleNamespace

import pytest
from helpers import ROOT
from mmdet.models.detectors import MaskRCNN
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config

from apq_mmdet.engine.ptq_loop import PTQLoop
from apq_mmdet.engine.quantized_config import load_recipe, quantized_config, read_config, standalone_config
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


def test_a_recipe_that_is_none_is_refused():
    cfg = Config.fromfile(FLOAT)
    cfg.quant = 4
    with pytest.raises(BadInputError, match="'quant' has to be a dict, got 4"):
        quantized_config(cfg, None, {})


def test_layers_without_data_are_written_down_beside_those_of_before():
    cfg = quantized_config(Config.fromfile(FLOAT), "minmax", {})
    once = standalone_config(cfg, ["a", "b"])
    twice = standalone_config(once, ["c"]).model.quant.overrides
    assert [rule.pattern for rule in twice.values()] == ["a", "b", "c"]


def test_imports_that_may_fail_still_may():
    cfg = Config.fromfile(FLOAT)
    cfg.custom_imports = dict(imports=["not_there"], allow_failed_imports=True)
    written = standalone_config(cfg, []).custom_imports
    assert written == dict(imports=["not_there", "apq_mmdet"], allow_failed_imports=True)


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


def test_class_names_of_an_mmdet_2_checkpoint_are_kept():
    loop = SimpleNamespace(float_meta=dict(CLASSES=("cat", "dog"), epoch=12), evaluate=False, eval_float=False)
    assert PTQLoop._dataset_meta(loop) == dict(classes=("cat", "dog"))
