"""Checks of what several commands take as options."""

import argparse
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction

from apq_mmdet.engine.block_states import DESCRIPTION
from apq_mmdet.engine.checkpoint import CHECKPOINT
from apq_mmdet.engine.quantized_config import CONFIG, RUN_CONFIG
from apq_mmdet.engine.run_record import STATES
from apq_mmdet.errors import BadInputError
from apq_mmdet.policy import MAX_BITS, MIN_BITS, check_bits
from apq_mmdet.report import REPORT

MOST_SEED = 2**32 - 1  # what numpy takes
OVERLAP_REMEDY = "; --allow-overlap accepts the AP of seen images"


def check_seed(seed: int, option: str = "--seed") -> int:
    """``seed``, or BadInputError where random generators do not take it."""
    if not 0 <= seed <= MOST_SEED:
        raise BadInputError(f"{option} must be from 0 to {MOST_SEED}, got {seed}")
    return seed


def check_memory_budget(gib: float) -> int:
    """``--memory-budget`` in bytes, or BadInputError."""
    if not 0 < gib < math.inf:
        raise BadInputError(f"--memory-budget must be a number of GiB above 0, got {gib:g}")
    return int(gib * 2**30)


def check_work_dir(folder: str | Path) -> None:
    """Raise BadInputError where ``folder`` cannot be made, because a file stands in its way."""
    folder = Path(folder)
    there = next((path for path in (folder, *folder.parents) if path.exists()), None)
    if there is not None and not there.is_dir():
        raise BadInputError(f"--work-dir {folder}: {there} is a file")


def refuse_overwriting(written: Iterable[Path], given: Iterable[str | Path], option: str) -> None:
    """Raise BadInputError where a file that a run writes is one that it was given.

    Args:
        written: files that it writes.
        given: files that it reads.
        option: that says where it writes.
    """
    targets = {path.resolve() for path in written}
    for path in given:
        if Path(path).resolve() in targets:
            raise BadInputError(f"{option}: the run would overwrite {path}; write elsewhere")


def refuse_foreign_config(folder: Path, option: str) -> None:
    """Raise BadInputError where ``folder`` holds a config that no run has written, and that one would replace.

    Args:
        folder: where weights and their config are going to be written.
        option: that names it.
    """
    traces = (CHECKPOINT, RUN_CONFIG, REPORT, f"{STATES}/{DESCRIPTION}")
    if (folder / CONFIG).exists() and not any((folder / name).exists() for name in traces):
        raise BadInputError(
            f"{option} {folder} holds a {CONFIG} that was not written by a run, and would be replaced: move it, or "
            f"use another folder"
        )


def add_bits(parser: argparse.ArgumentParser) -> None:
    """Options ``--w-bits`` and ``--a-bits``."""
    for key, what in (("--w-bits", "weight"), ("--a-bits", "activation")):
        parser.add_argument(key, type=int, help=f"{what} bits, {MIN_BITS} to {MAX_BITS} (default: the recipe's)")


def chosen_bits(args: argparse.Namespace) -> dict[str, int]:
    """``w_bits`` and ``a_bits`` where they were given; BadInputError where they are out of range."""
    given = {key: getattr(args, key) for key in ("w_bits", "a_bits")}
    return {k: check_bits(v, "--" + k.replace("_", "-")) for k, v in given.items() if v is not None}


def merge_options(cfg: Config, options: dict[str, Any] | None) -> None:
    """Merge what ``--cfg-options`` gave into a config; BadInputError where it does not fit."""
    try:
        cfg.merge_from_dict(options or {}, allow_list_keys=True)
    except (KeyError, TypeError, AssertionError) as error:
        raise BadInputError(f"--cfg-options: {error}") from error


def refuse_idle_keys(options: dict[str, Any] | None, idle: Callable[[str], bool], right: str) -> None:
    """Raise BadInputError for a ``--cfg-options`` key that would change nothing.

    Args:
        idle: whether a key is one of those.
        right: what to do instead; ``{}`` in it is the key without ``model.`` and ``quant.``.
    """
    for key in options or {}:
        if idle(key):
            name = key.removeprefix("model.").removeprefix("quant.")
            raise BadInputError(f"--cfg-options {key} would change nothing here: {right.format(name)}")


class KeyValues(DictAction):
    """``key=value`` pairs of the command line, as mmengine reads them; anything else is a usage error."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: Any = None) -> None:
        """See argparse.Action."""
        for value in values:
            if "=" not in value:
                parser.error(f"{option}: expected key=value, got {value!r}")
        try:
            super().__call__(parser, namespace, values, option)
        except AssertionError as error:  # brackets that do not match
            parser.error(f"{option}: {error}")
