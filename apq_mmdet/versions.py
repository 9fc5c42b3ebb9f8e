"""Checks the versions of the imported modules.

Modules are checked, not distributions: forks such as ``onedl-mmcv`` keep the import names and are welcome.
"""

from importlib import import_module

# module -> (first version that works, first version that does not)
SUPPORTED = {
    "torch": ("2.1.0", "3.0.0"),
    "mmcv": ("2.0.0", "3.0.0"),
    "mmengine": ("0.10.0", "1.0.0"),
    "mmdet": ("3.2.0", "4.0.0"),
}


OLDEST_TIMM = "1.0.31"  # which is optional


def parse(version: str) -> tuple[int, ...]:
    """The first three numbers of a version; what is no digit counts for nothing: '2.1.0rc1+cpu' -> (2, 1, 1)."""
    numbers = []
    for part in version.split("+")[0].split(".")[:3]:
        digits = "".join(c for c in part if c.isdigit())
        numbers.append(int(digits) if digits else 0)
    return tuple(numbers)


def imported_versions() -> dict[str, str]:
    """Version of each module of the stack, as the module itself reports it."""
    return {name: import_module(name).__version__ for name in SUPPORTED}


def check_versions() -> None:
    """Raise ImportError with what is installed and what is needed if a module of the stack does not fit."""
    for name, (first, last) in SUPPORTED.items():
        try:
            version = import_module(name).__version__
        except ImportError as error:
            raise ImportError(f"apq_mmdet needs {name} >={first},<{last}, and importing it failed: {error}") from error
        if not parse(first) <= parse(version) < parse(last):
            raise ImportError(
                f"apq_mmdet needs {name} >={first},<{last}; {name} {version} is imported here. "
                f"Install a fitting version or see 'Installation' in the README."
            )
