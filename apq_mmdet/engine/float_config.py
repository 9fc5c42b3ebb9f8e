"""Reading a config, and building the model that it defines; whatever is wrong becomes an error that names the file."""

import copy
from pathlib import Path

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


def config_files(cfg: Config) -> list[str]:
    """The file of a config that was read, and its bases; not those of lazy configs, which mmengine does not tell."""
    # mmengine puts the path of each before its text
    named = [line for line in cfg.text.splitlines() if line.endswith((".py", ".json", ".yml", ".yaml"))]
    return [cfg.filename, *(line for line in named if Path(line).is_absolute())]


def build_model(cfg: Config) -> nn.Module:
    """The model of a config; names without a scope are those of its default scope, or mmdet's.

    A ``data_preprocessor`` beside a model that has none is its own, as for mmengine's Runner.

    Raises:
        BadInputError: there is none, or it cannot be built.
    """
    register_all_modules(init_default_scope=False)
    init_default_scope(cfg.get("default_scope") or "mmdet")
    try:
        model = copy.copy(cfg.model)
        if "data_preprocessor" in cfg:
            model.setdefault("data_preprocessor", cfg.data_preprocessor)
        return MODELS.build(model)
    except Exception as error:  # a config can fail in any way
        raise BadInputError(f"config {cfg.filename}: no model can be built: {type(error).__name__}: {error}") from error
