"""How a worker's process takes and keeps memory."""

from __future__ import annotations

import contextlib
import ctypes
import resource

__all__ = ["bound_memory", "hold_memory"]

#: glibc's mallopt: parameter and value. One arena whose freed blocks are kept for the next tensor.
_HOLD = {
    "arena_max": (-8, 1),
    "mmap_threshold": (-3, 32 << 20),
    "trim_threshold": (-1, 512 << 20),
    "top_pad": (-2, 16 << 20),
}


def hold_memory() -> None:
    """Keep freed memory instead of giving it back at once: fresh pages of large tensors cost more time than what is
    computed on them. No more is held than was in use before; where there is no such setting, nothing changes."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _HOLD.values():
            mallopt(parameter, value)


def bound_memory(most_mb: int) -> None:
    """What this process may allocate from now on, what it was forked with included. Linux counts private pages, not
    mapped files; an allocation beyond the bound fails, and ends this session alone."""
    if most_mb:
        resource.setrlimit(resource.RLIMIT_DATA, (most_mb << 20, most_mb << 20))
