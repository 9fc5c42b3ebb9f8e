"""Files that are whole or absent: atomic writes, byte-identical serialisation, safe loading."""

import contextlib
import io
import json
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

from apq_mmdet.errors import BadInputError

TEMPORARY = ".*.tmp"  # files that a process which was killed while it wrote leaves behind


def write_atomic(path: Path, content: bytes) -> None:
    """Write ``content`` so that ``path`` holds either all of it or what it held before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_target(path: Path) -> None:
    """Raise BadInputError where no file can be written to ``path``: it is a folder, or below a file."""
    if path.is_dir():
        raise BadInputError(f"{path} is a folder; name a file to write")
    there = next(parent for parent in path.absolute().parents if parent.exists())
    if not there.is_dir():
        raise BadInputError(f"{path} cannot be written: {there} is a file")


def plain(content: Any) -> Any:
    """Nested containers as JSON gives them back; arrays and numbers of numpy and torch as lists and Python's own.

    NaN and infinity, which JSON does not know, are None.
    """
    return json.loads(json.dumps(content, default=_plain_value), parse_constant=lambda _: None)


def _plain_value(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    return list(value) if isinstance(value, Iterable) else str(value)


def map_values(value: Any, function: Callable[[Any], Any]) -> Any:
    """Nested dicts, lists and tuples (named ones without their names), all else through ``function``."""
    if isinstance(value, Mapping):
        return {key: map_values(inner, function) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map_values(inner, function) for inner in value)
    return function(value)


def write_json(path: Path, content: Any) -> None:
    """Atomic, indented JSON of what ``plain`` makes of the content."""
    write_atomic(path, (json.dumps(plain(content), indent=1) + "\n").encode())


def tensor_bytes(content: Any) -> bytes:
    """``torch.save`` to memory: torch writes a file's own name into the archive, so equal content needs no path."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def safe_load(path: str | Path) -> Any:
    """Load a checkpoint without unpickling arbitrary code, in torch's zip format or the one before it.

    Training checkpoints hold numpy values, HistoryBuffers and configs beside the weights. Numpy values come back as
    they are, configs and defaultdicts as plain containers; any other class or function is refused.

    Raises:
        BadInputError: missing, unreadable, or holding other objects; the first of these is named.
    """
    if not os.path.isfile(path):
        raise BadInputError(f"checkpoint {path} does not exist")
    try:
        with known_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = _why_unreadable(error)
        raise BadInputError(f"checkpoint {path} cannot be loaded safely (weights_only): {reason}") from error


def _why_unreadable(error: Exception) -> str:
    """What is wrong with the file, in a line."""
    message = str(error.__context__ or error)  # torch wraps what its reader says in several lines of advice
    if refused := re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", message):
        return f"it holds {refused[1]}, which is no tensor"
    return ": ".join(filter(None, [type(error).__name__, message.partition("\n")[0]]))


def _history_attribute(owner: Any, name: str) -> Any:
    """Stands in for ``getattr`` while a checkpoint is read: HistoryBuffer pickles its four statistics that way."""
    if owner is not HistoryBuffer or name not in ("mean", "max", "min", "current"):
        raise pickle.UnpicklingError(f"refused attribute {name!r} of {owner!r}")
    return getattr(owner, name)


def _without_factory(*_: Any) -> dict[Any, Any]:
    """Stands in for ``defaultdict``, which torch's reader cannot fill."""
    return {}


class _ConfigState:
    """Stands in for a config object: keeps its dict, file name and text, and runs nothing of it."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


@contextlib.contextmanager
def known_globals() -> Iterator[None]:
    """Context in which every ``torch.load`` is one of ``weights_only``, which accepts what training leaves.

    That holds for what others load, too, whose versions may not ask for it.
    """
    names = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    before = {name: os.environ.pop(name, None) for name in names}
    os.environ[names[0]] = "1"
    try:
        with accepted_globals(_known()):
            yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _known() -> list[Any]:
    """What training checkpoints hold beside tensors: classes, and (stand-in, name) pairs."""
    core = getattr(np, "_core", None) or np.core
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype]
    allowed += list({type(np.dtype(code)) for code in np.typecodes["All"]})
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # the name in files of numpy 1 and numpy 2
        allowed += [(getattr(core.multiarray, name), f"{module}.{name}") for name in ("_reconstruct", "scalar")]
    for module in ("mmcv.utils.config", "mmengine.config.config"):
        allowed += [(_ConfigState, f"{module}.Config"), (OrderedDict, f"{module}.ConfigDict")]
    allowed += [(OrderedDict, "addict.addict.Dict"), (_without_factory, "collections.defaultdict")]
    for module in ("builtins", "__builtin__"):
        allowed.append((_history_attribute, f"{module}.getattr"))
        allowed += [(kind, f"{module}.{kind.__name__}") for kind in (dict, list, int, float)]  # factories
    return allowed


def accepted_globals(allowed: Iterable[Any]) -> contextlib.AbstractContextManager[Any]:
    """Context in which ``weights_only`` loading accepts these classes and (object, name) pairs, too."""
    if torch.__version__ < (2, 6):  # knows no such pairs, or no list at all, and refuses files that hold them
        return contextlib.nullcontext()
    # on leaving, torch would take away what the caller has allowed before
    there = set(torch.serialization.get_safe_globals())
    return torch.serialization.safe_globals([entry for entry in allowed if entry not in there])
