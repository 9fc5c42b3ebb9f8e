"""The errors that a user of the toolbox may meet; the command line maps them to exit codes."""

from collections.abc import Sequence


class BadInputError(ValueError):
    """Something the user handed over is wrong (a key, a file, a pattern); found before long work starts."""


class CalibrationError(RuntimeError):
    """Calibration met data it cannot use: no samples, a zero or non-finite gradient, a quantizer without data."""


class UncalibratedError(RuntimeError):
    """A quantized layer was run before it had been calibrated or loaded."""


class CheckpointError(RuntimeError):
    """A checkpoint does not fit the model: other architecture, incomplete, newer format, other bits."""


def listed(items: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """The first few of what an error has to name, and how many more there are."""
    more = f" (and {len(items) - most} more)" if len(items) > most else ""
    return separator.join(items[:most]) + more
