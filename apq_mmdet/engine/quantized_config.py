"""Configs: the overlay that turns a float config into a quantization run, and the stand-alone config it leaves."""

import ast
import copy
from collections.abc import Iterator, Mapping
from keyword import iskeyword
from pathlib import Path, PurePath
from types import BuiltinFunctionType, FunctionType
from typing import Any

import mmengine.registry
import numpy as np
from mmdet.models.detectors.base import BaseDetector
from mmdet.registry import HOOKS
from mmdet.registry import MODELS as MMDET_MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hooks import EMAHook
from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

from apq_mmdet.checks import check_choice
from apq_mmdet.datasets.calibration import read_from_files
from apq_mmdet.engine.float_config import read_config
from apq_mmdet.errors import BadInputError
from apq_mmdet.files import map_values
from apq_mmdet.models.detectors import QuantizedDetector, register_quantized_detectors
from apq_mmdet.registry import MODELS, SCOPE, class_name

_PACKAGE = Path(__file__).resolve().parents[1]
RECIPES = _PACKAGE / "recipes"  # of an installation; a checkout has them among its configs
if not RECIPES.is_dir():
    RECIPES = _PACKAGE.parent / "configs" / "_base_" / "recipes"
DEFAULT_RECIPE = "apq_plus"
CONFIG = "config.py"  # in a work dir: of the quantized detector
RUN_CONFIG = "run_config.py"  # in a work dir: of the run that made it
KEPT = ("w_bits", "a_bits", "scope", "overrides")  # keys of a config's own quant that say nothing about the method
# all twelve COCO numbers; mmdet's CocoMetric gives six by default
COCO_ITEMS = [
    *("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l"),
    *("AR@100", "AR@300", "AR@1000", "AR_s@1000", "AR_m@1000", "AR_l@1000"),
]
TYPES = (type, FunctionType, BuiltinFunctionType)
KNOWN_PACKAGES = ("mmengine", "mmcv", "mmdet", "torch")  # whatever reads a config of mmdet has imported them
USUAL_SCOPES = (None, "mmengine", "mmdet", SCOPE)
COCO_PROPOSALS = (100, 300, 1000)  # mmdet's default


def load_recipe(name: str) -> dict[str, Any]:
    """The ``quant`` dict of a recipe, by its name or by the path of a config that defines ``quant``."""
    return read_recipe(name).quant.to_dict()


def read_recipe(name: str) -> Config:
    """The config of a recipe, by its name or path.

    Raises:
        BadInputError: no such recipe, or a file that defines no ``quant``.
    """
    path = Path(name) if name.endswith(".py") else RECIPES / f"{name}.py"
    if not path.is_file():
        if name.endswith(".py"):
            raise BadInputError(f"recipe file {name} does not exist")
        check_choice(name, sorted(known.stem for known in RECIPES.glob("*.py")), "--recipe")
    recipe = read_config(str(path))
    if not isinstance(recipe.get("quant"), dict):
        raise BadInputError(f"recipe file {path} defines no 'quant' dict")
    return recipe


def quantized_config(cfg: Config, recipe: str | None, settings: dict[str, Any]) -> Config:
    """A copy of a config whose model is quantized.

    Args:
        cfg: any mmdet config; a ``quant`` in its model or backbone, or else in itself, is the recipe, unless another
            is named.
        recipe: name or path; None for the config's own, or the default one. Bits, scope and overrides of the config's
            own stay.
        settings: keys of ``quant`` that override the recipe's (bits, scope).

    Raises:
        BadInputError: unknown recipe or detector type, no model.
    """
    cfg = _with_names(cfg)
    if not (isinstance(cfg.get("model"), dict) and cfg.model.get("type")):
        raise BadInputError("the config defines no model with a type")
    if "data_preprocessor" in cfg and "data_preprocessor" not in cfg.model:  # a Runner gives it to the model
        cfg.model.data_preprocessor = cfg.pop("data_preprocessor")
    read_from_files(cfg)
    own, inherited = _take_quant(cfg), cfg.pop("quant", None)  # of an inherited recipe, which the model may have
    quant = own = inherited if own is None else own
    if own is not None and not isinstance(own, dict):
        raise BadInputError(f"the config's 'quant' has to be a dict, got {own!r}")
    if recipe or own is None:
        found = read_recipe(recipe or DEFAULT_RECIPE)
        quant = {**found.quant.to_dict(), **{key: own[key] for key in KEPT if key in (own or {})}}
        _import_too(cfg, found.get("custom_imports"))
    cfg.model.type = _quantized_type(cfg.model.type, cfg.get("default_scope"))
    cfg.model.quant = {**quant, **settings}
    # averaging weights is for training; in a test, the hook would swap the calibrated model for a copy made before
    cfg.custom_hooks = [hook for hook in cfg.get("custom_hooks") or [] if not _averages_weights(hook)]
    for name, hook in list((cfg.get("default_hooks") or {}).items()):
        if hook and _averages_weights(hook):
            del cfg.default_hooks[name]
    for evaluator in _metrics(cfg.get("test_evaluator")):
        # mmdet finds the later ones of them by their place, which holds for three numbers of proposals only
        usual = len(evaluator.get("proposal_nums", COCO_PROPOSALS)) == len(COCO_PROPOSALS)
        if class_name(evaluator.get("type", "")) == "CocoMetric" and not evaluator.get("metric_items") and usual:
            evaluator["metric_items"] = list(COCO_ITEMS)
    return cfg


def _quantized_type(kind: str, scope: str | None) -> str:
    """The type of the quantized variant: by the name in mmdet's registry, or by the path of a class that it has not.

    Args:
        kind: the type of the float detector.
        scope: where a type without one is looked up, the config's ``default_scope``.
    """
    register_quantized_detectors()  # those of the config's own custom_imports too
    name = class_name(kind)
    try:
        of_scope = None if kind != name or scope in USUAL_SCOPES else ROOT.get(f"{scope}.{kind}")
        found = of_scope or MMDET_MODELS.get(kind) or MODELS.get(f"{SCOPE}.{name}")
    except Exception as error:  # a path is imported, and code can fail in any way
        raise BadInputError(f"model type {kind!r} cannot be imported: {error.__context__ or error}") from error
    if not (isinstance(found, type) and issubclass(found, BaseDetector)):
        raise BadInputError(f"model type {kind!r} is no detector of mmdet")
    if issubclass(found, QuantizedDetector):
        return f"{SCOPE}.{kind.removeprefix(f'{SCOPE}.')}"
    # a path also says what to import, which the name of a class elsewhere does not
    named = kind in (name, f"mmdet.{name}") or found.__module__.partition(".")[0] in KNOWN_PACKAGES
    known = named and MMDET_MODELS.module_dict.get(name) is found
    return f"{SCOPE}.{name}" if known else f"{SCOPE}.{found.__module__}.{found.__qualname__}"


def _averages_weights(hook: dict[str, Any]) -> bool:
    kind = HOOKS.get(hook["type"])
    return class_name(hook["type"]) == "EMAHook" or (isinstance(kind, type) and issubclass(kind, EMAHook))


def _with_names(cfg: Config) -> Config:
    """A copy of a config whose types are names; lazy configs, such as mmdet's own in ``mmdet/configs``, hold classes.

    A class of theirs becomes the name under which it is registered: its path may be that of something else, as a
    module of losses and a function in it can share a name.
    """
    kept = {key: cfg[key] for key in cfg.to_dict()}  # without what a lazy config has imported
    named = map_values(kept, lambda value: _name_of(value) if isinstance(value, TYPES) else value)
    if named == kept:
        return copy.deepcopy(cfg)
    named["default_scope"] = named.get("default_scope") or "mmdet"
    return Config(named, filename=cfg.filename)


def _name_of(kind: Any) -> str:
    """The name by which mmdet finds a class or function: as its registries know it, or else its path."""
    if kind.__module__.partition(".")[0] in KNOWN_PACKAGES:  # a path also says what to import
        for root in (value for value in vars(mmengine.registry).values() if isinstance(value, Registry)):
            of_mmdet = getattr(root.children.get("mmdet"), "module_dict", {})
            for modules, prefix in ((of_mmdet, ""), (root.module_dict, f"{root.scope}.")):
                name = next((name for name, known in modules.items() if known is kind), None)
                if name is not None:
                    return f"{prefix}{name}" if of_mmdet.get(name, kind) is not kind else name
    return f"{kind.__module__}.{kind.__qualname__}"


def _import_too(cfg: Config, imports: dict[str, Any] | None) -> None:
    """Let a config, and the stand-alone one made from it, import these modules too, before its own."""
    if imports:
        own = cfg.get("custom_imports") or {"imports": []}
        named = [part["imports"] for part in (imports, own)]
        modules = [module for part in named for module in ([part] if isinstance(part, str) else part)]
        cfg.custom_imports = {**imports, **own, "imports": list(dict.fromkeys(modules))}


def _take_quant(cfg: Config) -> dict[str, Any] | None:
    """Remove and return the ``quant`` of the model or of its backbone, whose type becomes the float one again."""
    backbone = cfg.model.get("backbone", {})
    if "quant" in backbone:
        backbone.type = class_name(backbone.type)
        return _seen_from_detector(backbone.pop("quant"))
    return cfg.model.pop("quant", None)


def _seen_from_detector(quant: dict[str, Any]) -> dict[str, Any]:
    """A backbone's ``quant`` as its detector's: the same scope and the same layers under their longer names."""
    quant = {**quant, "scope": "backbone"}
    for key in ("formats", "overrides"):
        quant[key] = _prefixed(quant.get(key, {}))
    if quant.get("search"):
        quant["search"] = {**quant["search"], "objectives": _prefixed(quant["search"].get("objectives", {}))}
    return quant


def _prefixed(rules: dict[str, Any]) -> dict[str, Any]:
    """Rules whose patterns speak of the same names behind ``backbone.``."""
    rules = {name: dict(rule) for name, rule in rules.items()}
    for rule in rules.values():
        pattern = rule.get("pattern", "*")
        regex = pattern.startswith("re:")
        rule["pattern"] = f"re:backbone\\.(?:{pattern[3:]})" if regex else f"backbone.{pattern}"
    return rules


def _metrics(evaluator: Any) -> list[ConfigDict]:
    """The metrics of a ``test_evaluator``: one, several, or those of an Evaluator."""
    if isinstance(evaluator, dict):
        return _metrics(evaluator["metrics"]) if "metrics" in evaluator else [evaluator]
    return [metric for part in evaluator or [] for metric in _metrics(part)]


def with_ptq_loop(cfg: Config, **loop: Any) -> Config:
    """Replace the config's test loop by a PTQLoop with these arguments, which evaluates in the same precision."""
    cfg = copy.deepcopy(cfg)
    cfg.test_cfg = _test_loop(cfg, f"{SCOPE}.PTQLoop", **loop)
    return cfg


def _test_loop(cfg: Config, kind: str, **loop: Any) -> dict[str, Any]:
    """A test loop in the precision of the config's own."""
    fp16 = dict(fp16=True) if (cfg.get("test_cfg") or {}).get("fp16") else {}
    return dict(type=kind, **fp16, **loop)


def _writable(cfg: Config) -> Config:
    """A copy of values that mean the same in a file: paths as text, without what only helped to write the config."""
    kept: dict[str, Any] = {}
    for key, value in cfg.to_dict().items():
        kept[key] = map_values(value, _as_literal)
        for where, _ in _leaves(kept[key], key):
            if word := next(filter(iskeyword, where.split(".")), None):  # mmengine writes keys as names
                raise BadInputError(f"config key {where}: {word!r} is a word of Python's own; give another name")
        strange = next((leaf for leaf in _leaves(kept[key]) if not _is_literal(leaf[1])), None)
        if strange and not strange[0]:  # of no use to a Runner, which reads containers and literals
            del kept[key]
        elif strange:
            raise BadInputError(
                f"config value {key}.{strange[0]} = {strange[1]!r} cannot be written into {CONFIG}, which mmdet's "
                f"tools read: give a finite number, text, None or True"
            )
    return Config(kept)


def _as_literal(value: Any) -> Any:
    """The text of a path, the list of a range, the number of a numpy scalar; all else as it is."""
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, range):
        return list(value)
    return value.item() if isinstance(value, np.generic) else value


def _leaves(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """(keys, value) of everything inside nested containers."""
    if isinstance(value, Mapping | list | tuple):
        parts = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in parts:
            yield from _leaves(inner, f"{where}.{key}".lstrip("."))
    else:
        yield where, value


def _is_literal(value: Any) -> bool:
    try:
        return ast.literal_eval(repr(value)) == value
    except (ValueError, SyntaxError):
        return False


def standalone_config(cfg: Config, left_float: list[str]) -> Config:
    """The config to load the quantized checkpoint with, for mmdet's own tools.

    Args:
        cfg: the config of the quantization run.
        left_float: names of layers that saw no data and stay float; written down as overrides.

    Raises:
        BadInputError: a value that cannot be written into a file, such as an infinite number, or such a key.
    """
    cfg = _writable(cfg)
    cfg.test_cfg = _test_loop(cfg, "TestLoop")
    cfg.load_from, cfg.resume = None, False
    cfg.launcher = "none"
    # before mmdet's tools build a Runner, whose log imports torchvision: see apq_mmdet.torchvision_operators
    _import_too(cfg, {"imports": [SCOPE]})
    for key in ("work_dir", "model_wrapper_cfg"):
        cfg.pop(key, None)
    if left_float:
        overrides = cfg.model.quant.get("overrides", {})
        last = max(overrides, default="")  # rules apply in the order of their names
        unseen = {f"{last}_no_data_{i}": dict(pattern=name, float=True) for i, name in enumerate(left_float)}
        cfg.model.quant.overrides = {**overrides, **unseen}
    return cfg
