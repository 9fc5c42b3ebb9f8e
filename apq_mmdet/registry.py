"""Registries of this package: children of mmengine's, so that ``type='apq_mmdet.X'`` works in any config.

mmengine imports this module when it meets the scope ``apq_mmdet`` and then the ``locations`` below.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar

from mmengine.registry import LOOPS as MMENGINE_LOOPS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry
from torch import nn

SCOPE = "apq_mmdet"
Made = TypeVar("Made", bound=Callable[..., Any])


class DetectorRegistry(Registry):
    """Knows a quantized variant of detectors too that were registered, or replaced, after this package was imported.

    ``apq_mmdet.path.to.Class`` is that of a detector which is not in mmdet's registry.
    """

    def get(self, key: str) -> Any:
        """The class of this name."""
        scope, name = self.split_scope_key(key)
        if scope in (None, SCOPE):
            if name not in self.module_dict:
                self.import_from_location()
            import_module(f"{SCOPE}.models.detectors").register_quantized_detectors()
        path = key.removeprefix(f"{SCOPE}.")  # which mmengine takes off before it asks
        if "." in path:
            import_module(f"{SCOPE}.models.detectors").register_by_path(path)
        return self.module_dict[path] if path in self.module_dict else super().get(key)


class ByClass(dict[type[nn.Module], Callable[..., Any]]):
    """Functions that are registered for classes of modules; a subclass has that of its nearest registered ancestor."""

    def register(self, *classes: type[nn.Module]) -> Callable[[Made], Made]:
        """Decorator: the decorated function is that of these classes."""

        def register(function: Made) -> Made:
            self.update(dict.fromkeys(classes, function))
            return function

        return register

    def find(self, module: nn.Module) -> Callable[..., Any] | None:
        """The function for a module, None where there is none."""
        return next((self[cls] for cls in type(module).__mro__ if cls in self), None)


def class_name(kind: str | type) -> str:
    """Name of a class given by its registry name, with or without a scope, or, in lazy configs, by itself."""
    return kind.split(".")[-1] if isinstance(kind, str) else kind.__name__


MODELS = DetectorRegistry("model", parent=MMENGINE_MODELS, scope=SCOPE, locations=["apq_mmdet.models"])
LOOPS = Registry("loop", parent=MMENGINE_LOOPS, scope=SCOPE, locations=["apq_mmdet.engine"])
QUANTIZERS = Registry("quantizer", scope=SCOPE, locations=["apq_mmdet.quantizers"])
OBJECTIVES = Registry("objective", scope=SCOPE, locations=["apq_mmdet.calibration.objectives"])
