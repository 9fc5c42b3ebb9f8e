"""Running one detector or row: its command line, its process, its log, and the result that is left of it."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apq_mmdet.errors import BadInputError
from apq_mmdet.files import write_json
from apq_mmdet.reproduction.checkpoints import Checkpoint
from apq_mmdet.reproduction.costs import LOG_BYTES
from apq_mmdet.reproduction.prepare import Examined
from apq_mmdet.reproduction.rows import ROOT, Detector, Row
from apq_mmdet.reproduction.settings import Settings

QUANTIZE = [str(ROOT / "tools" / "quantize_det.py")]
FLOAT_AP = ["-m", "apq_mmdet.reproduction.float_ap"]
RESULT, CONDITIONS, LOG = "result.json", "conditions.json", "log.txt"
KEPT = (  # of a report
    *("versions", "device", "threads", "seconds", "calibration_seconds", "peak_memory", "sizes"),
    "evaluated_calibration_images",
)
FULL_DISK = ("No space left on device", "PytorchStreamWriter failed writing file")  # what Python and torch say of it
TAIL = 15  # lines of a log that a failure shows
GRACE = 30  # seconds that an interrupted process has to end by itself


class RunFailedError(RuntimeError):
    """A detector or row ended without a result; the message says why, with the end of its log."""


class DiskFullError(RunFailedError):
    """There is no space for what a row writes."""


def command_line(item: Detector | Row, checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """The process that measures a detector, or quantizes and measures a row."""
    line = [sys.executable]
    if settings.processes:
        line += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={settings.processes}"]
    line += QUANTIZE if isinstance(item, Row) else FLOAT_AP
    line += [str(settings.config(item.name)), str(checkpoint.path), "--work-dir", str(settings.folder(item.name))]
    if isinstance(item, Row):
        line += ["--num-calib", str(item.num_calib), "--seed", str(item.seed)]
        line += ["--memory-budget", str(settings.memory_budget), "--resume"]
        line += ["--allow-overlap"] if settings.allow_overlap else []
    line += ["--launcher", "pytorch"] if settings.processes else []
    line += ["--device", settings.device] if settings.device else []
    return line


def execute(item: Detector | Row, examined: Examined, settings: Settings) -> dict[str, Any]:
    """Measure a detector, or quantize and measure a row; its result, which is also in its folder.

    Raises:
        RunFailedError: it failed.
    """
    checkpoint = examined.checkpoints[(item.detector if isinstance(item, Row) else item).name]
    folder = settings.folder(item.name)
    write_json(folder / CONDITIONS, examined.conditions[item.name])
    run_logged(command_line(item, checkpoint, settings), folder / LOG)
    report = json.loads((folder / "report.json").read_text())
    if isinstance(item, Row):
        listed = [image_id for image_id, _ in examined.images[item.name]]
        if report["calibration_images"] != listed:
            raise RunFailedError(f"{folder / 'report.json'} tells of other calibration images than were listed")
    result = {
        "metrics": report["metrics"]["quantized" if isinstance(item, Row) else "float"],
        **{key: report[key] for key in KEPT if key in report},
    }
    write_json(folder / RESULT, result)
    return result


def finished(item: Detector | Row, examined: Examined, settings: Settings) -> dict[str, Any] | None:
    """The result of an earlier command, or None.

    Raises:
        BadInputError: what is there was made, or begun, under other conditions.
    """
    folder, conditions = settings.folder(item.name), examined.conditions[item.name]
    if (folder / CONDITIONS).exists():
        before = json.loads((folder / CONDITIONS).read_text())
        changed = [key for key in conditions if before.get(key) != conditions[key]]
        if changed:
            raise BadInputError(
                f"{folder} was made under other conditions, they differ in {', '.join(changed)}; use another "
                f"--work-dir, or remove the folder to make it anew"
            )
    return json.loads((folder / RESULT).read_text()) if (folder / RESULT).exists() else None


def run_logged(line: Sequence[str], log: Path) -> None:
    """Run a command, its output at the end of ``log``. Interrupted, this ends the command too.

    Raises:
        DiskFullError: it failed for want of space.
        RunFailedError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        before = file.tell()  # an earlier attempt's
        file.write(f"\n$ {' '.join(line)}\n".encode())
        file.flush()
        # inherits the lock of the work dir, see lock.py; leads a group, which holds all that it starts
        process = subprocess.Popen(line, stdout=file, stderr=subprocess.STDOUT, close_fds=False, start_new_session=True)
        try:
            code = process.wait()
        finally:
            _end(process)
    if code:
        end = tail(log, before)
        full = any(words in end for words in FULL_DISK) or shutil.disk_usage(log.parent).free < LOG_BYTES
        message = f"exit code {code}; the end of {log}:\n{end}"
        raise DiskFullError(f"the disk is full. {message}") if full else RunFailedError(message)


def _end(process: subprocess.Popen) -> None:
    """End a process, gently at first, and what is left of its group: workers of data loaders outlive their parent."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path, start: int = 0) -> str:
    """The last lines of a log from byte ``start`` on; of a progress bar each state is a line."""
    text = log.read_bytes()[start:].decode(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip()]
    return "\n".join(f"    {line}" for line in lines[-TAIL:])
