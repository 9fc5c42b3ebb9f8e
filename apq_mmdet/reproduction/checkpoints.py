"""Float checkpoints: where they lie, whether they are the ones meant, and fetching them when asked to."""

import errno
import hashlib
import os
import re
import urllib.parse
import uuid
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch.hub

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import safe_load
from apq_mmdet.reproduction.rows import Detector


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file.

    Attributes:
        sha256: of the file as it was published.
        verified: whether that could be compared with what its publisher says.
        converted: whether ``path`` is a conversion of that file into mmdet 3's keys.
    """

    path: Path
    sha256: str
    verified: bool
    converted: bool = False


def file_of(detector: Detector, folder: Path) -> Path:
    """Where a detector's checkpoint lies: under the name that its address ends with."""
    return folder / Path(urllib.parse.urlparse(detector.weights).path).name


def expected_sha256(detector: Detector) -> str | None:
    """The digest of a detector's checkpoint, or its first digits, which end the names of OpenMMLab's files."""
    if detector.sha256:
        return detector.sha256
    found = re.search(r"-([0-9a-f]{8})\.pth$", detector.weights)
    return found[1] if found else None


def refuse_missing(detectors: list[Detector], folder: Path) -> None:
    """Raise BadInputError with the addresses of the checkpoints that are not there."""
    missing = [detector for detector in detectors if not file_of(detector, folder).is_file()]
    if missing:
        listed = "\n".join(f"  {file_of(d, folder)}  from  {d.weights}" for d in missing)
        raise BadInputError(f"checkpoints are missing; --download fetches them:\n{listed}")


def make_folder(folder: Path) -> None:
    """Make the folder of checkpoints; BadInputError where that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"--checkpoints {folder} cannot be made: {error}") from error


def download(detector: Detector, folder: Path) -> None:
    """Fetch a checkpoint that is not there; the file is whole and of the expected digest, or absent.

    Raises:
        BadInputError: its address cannot be reached, or gives something else, or the folder cannot be made.
    """
    path = file_of(detector, folder)
    if path.is_file():
        return
    make_folder(folder)
    print(f"downloading {detector.weights}", flush=True)
    # of its own: other commands, also on other machines, may fetch the same file
    partial, expected = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part"), expected_sha256(detector)
    try:
        torch.hub.download_url_to_file(detector.weights, str(partial), hash_prefix=expected)
        if expected is None:  # a connection that breaks off is no error by itself
            safe_load(partial)
        partial.replace(path)
    except (OSError, HTTPException, RuntimeError, ValueError, BadInputError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error
        raise BadInputError(f"{detector.weights} cannot be downloaded to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


def verify(detector: Detector, folder: Path) -> Checkpoint:
    """The checkpoint of a detector, its digest compared with the expected one where there is one.

    Raises:
        BadInputError: it is another file.
    """
    path, expected = file_of(detector, folder), expected_sha256(detector)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected and not sha256.startswith(expected.lower()):
        raise BadInputError(
            f"checkpoint {path} is not the one of {detector.name}: its sha256 starts with {sha256[: len(expected)]} "
            f"instead of {expected}; remove it and download it again from {detector.weights}"
        )
    return Checkpoint(path, sha256, verified=bool(expected))
