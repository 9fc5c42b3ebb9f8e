"""Finished blocks on disk, so that a killed calibration goes on where it stopped."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import tensor_bytes, write_atomic, write_json

DESCRIPTION = "run.json"  # in the folder, of the run that its blocks belong to


def refuse_other_run(folder: Path, run: dict[str, Any]) -> None:
    """Raise BadInputError if ``folder`` holds blocks of a run of another description; changes nothing."""
    description = folder / DESCRIPTION
    if not description.exists():
        return
    run = _plain(run)
    kept = json.loads(description.read_text())
    changed = [key for key in run if kept.get(key) != run[key]]
    if changed:
        raise BadInputError(
            f"--resume: {folder} belongs to another run, it differs in {', '.join(changed)}; repeat the "
            f"command of that run, or drop --resume to start anew"
        )


def _plain(run: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    return json.loads(json.dumps(run, default=str))


class BlockStatesOnDisk:
    """One file a finished block in ``folder``, beside a description of the run that they belong to.

    Args:
        folder: made if absent.
        run: description of everything that the result depends on; plain containers.
        resume: go on with what is there; otherwise start anew.

    Raises:
        BadInputError: what is there belongs to another run.
    """

    def __init__(self, folder: Path, run: dict[str, Any], resume: bool) -> None:
        self.folder = folder
        for leftover in folder.glob("apq_capture_*"):  # of a killed run
            shutil.rmtree(leftover, ignore_errors=True)
        if resume and (folder / DESCRIPTION).exists():
            refuse_other_run(folder, run)
            return
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / DESCRIPTION, _plain(run))

    def _path(self, block: str) -> Path:
        return self.folder / f"{block}.pth"

    def load(self, block: str) -> dict[str, Any] | None:
        """What was saved of a finished block, or None."""
        path = self._path(block)
        return torch.load(path, weights_only=True) if path.exists() else None

    def save(self, block: str, finished: dict[str, Any]) -> None:
        """Keep a finished block, atomically."""
        write_atomic(self._path(block), tensor_bytes(finished))
