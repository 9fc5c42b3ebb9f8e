"""One command at a time in a work dir, counting what a killed command left running."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from apq_mmdet.errors import BadInputError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, also by the processes that are started meanwhile, for as long as they live.

    Raises:
        BadInputError: another command works in the folder, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
        raise BadInputError(f"--work-dir {folder} cannot be made: {error}") from error
    with (folder / ".lock").open("w") as file:
        os.set_inheritable(file.fileno(), True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInputError(
                f"another command, or a row that a killed command left running, works in {folder}; wait or end it"
            ) from None
        yield
