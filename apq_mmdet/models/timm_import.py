"""The door to timm, which is optional: nothing else imports it before."""

from importlib import import_module
from types import ModuleType

from apq_mmdet.errors import BadInputError
from apq_mmdet.versions import OLDEST_TIMM, parse

INSTALL = f"pip install 'timm>={OLDEST_TIMM}'"


def import_timm() -> ModuleType:
    """timm, with its attention, blocks and patches made known to quantization and calibration.

    Whoever has a timm model already may ``import apq_mmdet.models.timm_layers`` instead, before ``quantize_model``.

    Raises:
        BadInputError: timm is not installed, or too old.
    """
    try:
        timm = import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        raise BadInputError(f"a timm model is asked for and timm is not installed: {INSTALL}") from error
    if parse(timm.__version__) < parse(OLDEST_TIMM):
        raise BadInputError(f"timm >= {OLDEST_TIMM} is needed and {timm.__version__} is installed: {INSTALL}")
    import_module("apq_mmdet.models.timm_layers")
    return timm
