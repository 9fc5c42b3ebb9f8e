"""The memory of this process: its peak, and what the allocator keeps of it for nothing."""

import ctypes
import sys

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None

PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes, of what the system tells


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process and peak CUDA memory, in bytes; None where there is none or nobody knows."""
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    host = resource and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * PEAK_UNIT
    return {"host_bytes": host, "cuda_bytes": cuda}


def release_freed() -> None:
    """Give memory that is free back to the system, where the C library can (glibc).

    An image's tensors leave holes that those of an image of another size do not fit into: over many images the
    process can grow, though what it holds does not.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
