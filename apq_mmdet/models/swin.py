"""The quantized Swin backbone, usable on its own in ``model.backbone`` of any mmdet config."""

from typing import Any

from mmdet.models.backbones import SwinTransformer

from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.layers import quantize_model
from apq_mmdet.registry import MODELS


@MODELS.register_module(name="SwinTransformer")
class QuantizedSwinTransformer(SwinTransformer):
    """mmdet's SwinTransformer with quantized layers.

    Args:
        quant: the ``quant`` dict of a recipe; see docs. Its scope says nothing here: the backbone is all there is.
        args, kwargs: as for mmdet's class.
    """

    def __init__(self, *args: Any, quant: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = Recipe.from_dict(quant)
        quantize_model(self, self.recipe.policy)
