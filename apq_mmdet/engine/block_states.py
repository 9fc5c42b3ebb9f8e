"""Finished blocks on disk, so that a killed calibration goes on where it stopped."""

import json
import shutil
from pathlib import Path
from typing import IO, Any

import torch

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import TEMPORARY, plain, tensor_bytes, write_atomic, write_json
from apq_mmdet.locks import LOCK, lock

DESCRIPTION = "run.json"  # in the folder, of the run that its blocks belong to
FINISHED = "finished"  # in the folder, once all that the blocks are kept for has been written
CAPTURES = "apq_capture_*"  # folders of captured tensors, which a killed run leaves behind
FORMAT = 5  # of the files of blocks, and of how their ranges are found; runs do not go on with those of another
_LOCKED: dict[Path, IO[str]] = {}  # by this process; closing a file would give its lock back


def _described(run: dict[str, Any]) -> dict[str, Any]:
    return plain({**run, "block_format": FORMAT})


def check_folder(folder: Path, run: dict[str, Any], resume: bool) -> None:
    """Raise BadInputError if a run must not use ``folder`` for its blocks; changes nothing.

    Args:
        folder: may hold blocks of an earlier run.
        run: description of everything that the result depends on; plain containers.
        resume: whether the run wants to go on with them.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise BadInputError(f"{folder} is a file; finished blocks are kept in a folder of that name")
    if not (folder / DESCRIPTION).exists():
        foreign = next((p for p in sorted(folder.iterdir()) if not (p.match(CAPTURES) or p.name.startswith("."))), None)
        if foreign is not None:
            raise BadInputError(
                f"{folder} holds {foreign.name}, which is no block of a calibration: use another --work-dir"
            )
        return
    run, kept = _described(run), _kept_description(folder)
    changed = [key for key in run if kept.get(key) != run[key]]
    blocks = 0 if (folder / FINISHED).exists() else len(list(folder.glob("*.pth")))  # that may still be wanted
    if resume and changed:
        raise BadInputError(
            f"--resume: {folder} belongs to another run, it differs in {', '.join(changed)}; repeat the command of "
            f"that run, or {'use another --work-dir' if blocks else 'drop --resume to start anew'}"
        )
    if blocks and not resume:
        if changed:
            whose = f"a run that was broken off, from which this one differs in {', '.join(changed)}"
            remedy = "repeat the command of that run with --resume, use another --work-dir,"
        else:
            whose, remedy = "this very run", "go on with --resume,"
        raise BadInputError(
            f"{folder} holds {blocks} finished blocks of {whose}: {remedy} or delete the folder to start anew"
        )


def _kept_description(folder: Path) -> dict[str, Any]:
    """What is written down of the run that the blocks in a folder belong to."""
    try:
        kept = json.loads((folder / DESCRIPTION).read_text())
    except ValueError:  # no JSON, or no text at all
        kept = None
    if not isinstance(kept, dict):
        raise BadInputError(
            f"{folder / DESCRIPTION} is damaged, so that nothing tells whose blocks lie beside it: delete {folder} to "
            f"start anew"
        )
    return kept


def _lock(folder: Path) -> None:
    """Keep other processes out for as long as this one lives, though not for the processes that it forks.

    Raises:
        BadInputError: another process is in it, or it cannot be made or written to.
    """
    if folder.resolve() not in _LOCKED:
        refusal = f"another run works in {folder}: wait for its end or use another --work-dir"
        _LOCKED[folder.resolve()] = lock(folder, refusal)


class BlockStatesOnDisk:
    """One file a finished block in ``folder``, beside a description of the run that they belong to.

    Args:
        folder: made if absent; what a finished run has left in it is deleted, unless this one goes on with it.
        run: description of everything that the result depends on; plain containers.
        resume: go on with what is there; otherwise start anew.

    Raises:
        BadInputError: see ``check_folder``; or another process works in the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path, run: dict[str, Any], resume: bool) -> None:
        if (folder / LOCK).exists():  # a run that goes on has more to say than what it has left so far
            _lock(folder)
        check_folder(folder, run, resume)
        self.folder = folder
        _lock(folder)
        for leftover in folder.glob(CAPTURES):
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in folder.glob(TEMPORARY):
            leftover.unlink(missing_ok=True)
        if resume and (folder / DESCRIPTION).exists():
            (folder / FINISHED).unlink(missing_ok=True)  # until this run says so
            return
        for path in (*folder.glob("*.pth"), folder / FINISHED):  # whose they are is the last to go
            path.unlink(missing_ok=True)
        write_json(folder / DESCRIPTION, _described(run))

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.pth"

    def load(self, block: str) -> dict[str, Any] | None:
        """What was saved of a finished block, or None.

        Raises:
            BadInputError: the file is damaged.
        """
        path = self._path(block)
        if not path.exists():
            return None
        try:
            kept = torch.load(path, weights_only=True)
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged file can fail in any way
            raise BadInputError(
                f"{path} is damaged ({type(error).__name__}): delete it, and --resume makes it anew"
            ) from error
        return kept

    def save(self, block: str, finished: dict[str, Any]) -> None:
        """Keep a finished block, atomically."""
        write_atomic(self._path(block), tensor_bytes(finished))

    def finish(self) -> None:
        """Say that all that the blocks are kept for has been written: the same run may start anew."""
        write_atomic(self.folder / FINISHED, b"")
