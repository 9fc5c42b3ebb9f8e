"""The memory of this process: its peak, and what the allocator keeps of it for nothing."""

import ctypes
import resource

import torch


def peak_memory() -> dict[str, int | None]:
    """Peak resident memory of this process and peak CUDA memory (None without CUDA), in bytes."""
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
    return {"host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "cuda_bytes": cuda}


def release_freed() -> None:
    """Give memory that is free back to the system, where the C library can (glibc).

    An image's tensors leave holes that those of an image of another size do not fit into: over many images the
    process can grow, though what it holds does not.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
