"""Folders in which one command works at a time."""

import errno
import os
import warnings
from pathlib import Path
from typing import IO

from apq_mmdet.errors import BadInputError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

LOCK = ".lock"  # in the folder


def lock(folder: Path, refusal: str, inherited: bool = False) -> IO[str]:
    """Keep other commands out of a folder until the returned file is closed or the process ends.

    A file system without locks is warned of, and used without.

    Args:
        folder: is made where it does not exist.
        refusal: what to say where another command is in it.
        inherited: whether the processes that this one starts hold the lock too, for as long as they live. Else only
            this one does, though it must not open and close the lock file again meanwhile.

    Raises:
        BadInputError: another command is in it, or it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise BadInputError(f"--work-dir: {folder} cannot be written to: {error}") from error
    if fcntl is None:
        return file
    os.set_inheritable(file.fileno(), inherited)
    take = fcntl.flock if inherited else fcntl.lockf  # the first belongs to the open file, the second to the process
    try:
        take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.close()
            raise BadInputError(refusal) from None
        warnings.warn(f"{folder} cannot be locked ({error}): start no second run in it", stacklevel=2)
    return file
