"""Memory of this process."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MADV_POPULATE_READ = 22  # of madvise(2)
KEPT_BYTES = 256 << 20
MAPPED_BYTES = 32 << 20  # the most that glibc takes


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Tell glibc to keep up to ``KEPT_BYTES`` of freed memory for later allocations. Returns False without glibc.

    By default glibc may return the activations of one layer to the system and take fresh pages for the next layer,
    depending on where small allocations lie: half a million page faults in a shard, or none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


def release_freed_memory() -> None:
    """Return all free memory to the system, with glibc. It would otherwise fragment and grow."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def populate(address: int, size: int) -> None:
    """Ask the system to read mapped pages of a file into memory at once, if it supports that (Linux 5.14).

    Raises:
        OSError: the file cannot be read, or has become shorter.
    """
    start = address - address % mmap.PAGESIZE
    failed = size and _madvise()(start, address + size - start, _MADV_POPULATE_READ)
    if failed and (number := ctypes.get_errno()) != errno.EINVAL:
        raise OSError(number, os.strerror(number))


@lru_cache(maxsize=1)
def _madvise() -> Any:
    """Return madvise(2). Unlike `mmap.madvise`, it releases Python's global interpreter lock."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def peak_memory() -> int:
    """Return the peak memory of this process since its start, in bytes.

    The ru_maxrss of getrusage(2) is not used: it starts at the value of the parent process. psutil does not report it.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
