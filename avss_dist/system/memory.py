"""The memory of a process and of a machine."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_MADV_POPULATE_READ = 22  # of madvise(2)
KEPT_BYTES = 256 << 20
PROBES = 32
MAPPED_BYTES = 32 << 20  # the most that glibc takes


@lru_cache(maxsize=1)
def keep_freed_memory() -> bool:
    """Tell glibc to keep up to ``KEPT_BYTES`` of freed memory for the next allocation; False where there is no glibc.

    By default it hands the activations of one layer back to the system and takes fresh pages for those of the next,
    or does not, by where small allocations happen to lie: half a million page faults in a shard, or none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES) and mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES))


def give_back_freed_memory() -> None:
    """Hand all that is free to the system, where there is glibc; what is kept of it is in pieces, and grows."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def populate(address: int, size: int) -> None:
    """Have the system bring mapped pages of a file into memory, where it can do so at once (Linux 5.14).

    Raises:
        OSError: the file cannot be read, or has become shorter.
    """
    start = address - address % mmap.PAGESIZE
    failed = size and _madvise()(start, address + size - start, _MADV_POPULATE_READ)
    if failed and (number := ctypes.get_errno()) != errno.EINVAL:
        raise OSError(number, os.strerror(number))


@lru_cache(maxsize=1)
def _madvise() -> Any:
    """Unlike mmap's own, it does not hold Python's lock meanwhile."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return madvise


def mapped_around_a_byte(file: Path) -> int:
    """Bytes of a mapped file that come into memory when one of it is read, on average over ``PROBES`` places.

    By default Linux brings 64 KiB; where the page cache holds larger pieces, all of a piece.
    """
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        before = psutil.Process().memory_info().shared
        for place in range(0, len(mapped), max(1, len(mapped) // PROBES)):
            mapped[place]
        return max(mmap.PAGESIZE, (psutil.Process().memory_info().shared - before) // PROBES)


def resident_memory() -> int:
    """Bytes of memory that this process has now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes that this process had since it began, or since `reset_peak_memory`.

    Not getrusage(2), whose ru_maxrss starts at that of the process which started this one; psutil does not have it.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak_memory() -> None:
    """Forget the most memory that this process had, where the system lets it."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
