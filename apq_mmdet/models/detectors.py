"""``apq_mmdet.X`` for every detector X of mmdet: the same detector, with quantized layers."""

from typing import Any

import mmdet.models.detectors  # noqa: F401  (registers the detectors)
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.utils import get_object_from_string

from apq_mmdet.calibration.recipe import Recipe
from apq_mmdet.layers import LayerRow, quantize_model
from apq_mmdet.registry import MODELS


class QuantizedDetector:
    """Mixin that makes a detector a quantized one when it is built, wherever it is built.

    Args:
        quant: the ``quant`` dict of a recipe.
        args, kwargs: as for the float detector.

    Attributes:
        recipe: the parsed ``quant``.
        quantization_table: one row for each layer and role.
    """

    recipe: Recipe
    quantization_table: list[LayerRow]

    def __init__(self, *args: Any, quant: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recipe = Recipe.from_dict(quant)
        quantize_model(self, self.recipe.policy)


def register_quantized_detectors() -> None:
    """Register a quantized variant of each detector that mmdet's registry holds by now, under the detector's name.

    One whose detector has been replaced since (``register_module(force=True)``) is replaced too. A detector that is
    quantized already is its own variant.
    """
    for name, cls in MMDET_MODELS.module_dict.items():
        if not (isinstance(cls, type) and issubclass(cls, BaseDetector)) or cls is BaseDetector:
            continue
        _register(name, cls)


def register_by_path(path: str) -> None:
    """Register the quantized variant of a detector under the path of its class, if there is such a class.

    mmdet's own have names.
    """
    cls = None if path.startswith("mmdet.") else get_object_from_string(path)
    if isinstance(cls, type) and issubclass(cls, BaseDetector | QuantizedDetector):
        _register(path, cls)


def _register(name: str, cls: type[BaseDetector]) -> None:
    known = MODELS.module_dict.get(name)
    if issubclass(cls, QuantizedDetector):
        MODELS.register_module(name=name, module=cls, force=True)
    elif known is None or (known.__module__ == __name__ and cls not in known.__bases__):  # none of a user's own
        doc = f"{name} with quantized layers; see QuantizedDetector."
        own_name = name.replace(".", "_")
        quantized = type(own_name, (QuantizedDetector, cls), {"__doc__": doc, "__module__": __name__})
        MODELS.register_module(name=name, module=quantized, force=True)
        globals()[own_name] = quantized  # where pickle looks for it, in processes that have registered it


register_quantized_detectors()
