"""One command at a time in a work dir, counting what a killed command left running."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from apq_mmdet.locks import lock


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, also by the processes that are started meanwhile, for as long as they live.

    Raises:
        BadInputError: another command works in the folder, or it cannot be made or written to.
    """
    refusal = f"another command, or a row that a killed command left running, works in {folder}; wait or end it"
    with lock(folder, refusal, inherited=True):
        yield
