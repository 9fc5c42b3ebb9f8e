"""Checks of single values of a config; every error names the key, the value and what would be right."""

import difflib
import math
from collections.abc import Collection, Iterable
from dataclasses import fields
from typing import Any

from apq_mmdet.errors import BadInputError


def refuse_unknown(keys: Iterable[Any], known: Collection[Any], where: str) -> None:
    """Raise BadInputError with the nearest known key if ``keys`` holds an unknown one."""
    for key in keys:
        if key not in known:
            raise BadInputError(f"{where}: unknown key {key!r}; {_hint(key, known)}")


def check_choice(value: Any, choices: Iterable[str], where: str) -> Any:
    """``value`` if it is one of the choices, else BadInputError with the nearest of them."""
    choices = list(choices)  # a dict would not take a value that cannot be hashed
    if value not in choices:
        raise BadInputError(f"{where}: unknown value {value!r}; {_hint(value, choices)}")
    return value


def _hint(wrong: Any, known: Iterable[Any]) -> str:
    names = [str(name) for name in known]
    near = difflib.get_close_matches(str(wrong), names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"


def check_fields(config: Any, cls: type, where: str, expected: str) -> dict[str, Any]:
    """A copy of ``config`` if it is a dict of fields of a dataclass, else BadInputError."""
    config = check_dict(config, where, expected)
    refuse_unknown(config, [f.name for f in fields(cls)], where)
    return config


def check_dict(value: Any, where: str, expected: str) -> dict[str, Any]:
    """A shallow copy of ``value`` if it is a dict or a config's, else BadInputError that shows an ``expected`` one."""
    if not hasattr(value, "keys"):
        raise BadInputError(f"{where}: expected {expected}, got {value!r}")
    return dict(value)


def check_rules(value: Any, where: str, expected: str) -> dict[str, Any]:
    """A copy of a dict of rules in the order in which they apply, that of their names, else BadInputError."""
    rules = check_dict(value, where, expected)
    for name in rules:
        if not isinstance(name, str):
            raise BadInputError(f"{where}: expected text as name of a rule, got {name!r}")
    return dict(sorted(rules.items()))


def check_bool(value: Any, where: str) -> bool:
    """``value`` if it is True or False, else BadInputError."""
    if not isinstance(value, bool):
        raise BadInputError(f"{where}: expected True or False, got {value!r}")
    return value


def check_whole(value: Any, where: str, least: int) -> int:
    """``value`` if it is a whole number of at least so much, else BadInputError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise BadInputError(f"{where}: expected a whole number >= {least}, got {value!r}")
    return value


def check_number(value: Any, where: str, most: float = math.inf) -> float:
    """``value`` if it is a number from 0 to ``most``, else BadInputError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise BadInputError(f"{where}: expected a number from 0 to {most:g}, got {value!r}")
    return value
