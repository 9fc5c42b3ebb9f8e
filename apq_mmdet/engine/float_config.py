"""Reading a config, and building the model that it defines; whatever is wrong becomes an error that names the file."""

from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from apq_mmdet.errors import BadInputError


def read_config(path: str) -> Config:
    """``Config.fromfile``.

    Raises:
        BadInputError: the file cannot be read.
    """
    try:
        return Config.fromfile(path)
    except Exception as error:  # a config is code: it can fail in any way
        if getattr(error, "name", None) == "pkg_resources":  # by which mmengine finds the configs of mmdet
            raise BadInputError(f'config {path} needs pkg_resources: pip install "setuptools<81"') from error
        raise BadInputError(f"config {path} cannot be read: {type(error).__name__}: {error}") from error


def build_model(cfg: Config) -> nn.Module:
    """The model of a config; names without a scope are those of its default scope, or mmdet's.

    Raises:
        BadInputError: there is none, or it cannot be built.
    """
    register_all_modules(init_default_scope=False)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    try:
        return MODELS.build(cfg.model)
    except Exception as error:  # a config can fail in any way
        raise BadInputError(f"config {cfg.filename}: no model can be built: {type(error).__name__}: {error}") from error
