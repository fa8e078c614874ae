"""Memory of this process, limits of control groups, and retries of batches that do not fit."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import product
from pathlib import Path, PurePath
from typing import TypeVar

import torch

from avss_dist.core.errors import BatchTooLarge

# Parameters of mallopt(3)
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MADV_POPULATE_READ = 22  # of madvise(2)
FREED_BYTES = 256 << 20
MAPPED_BYTES = 32 << 20  # the most that glibc takes


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Tell glibc, where it is there, to keep up to ``FREED_BYTES`` of freed memory for later allocations.

    By default glibc may return the activations of one layer to the system and take fresh pages for the next layer,
    depending on where small allocations lie: half a million page faults in a shard, or none.
    """
    with suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, MAPPED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, FREED_BYTES)


def release_freed_memory() -> None:
    """Return all free memory to the system, with glibc. It would otherwise fragment and grow."""
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_cached_memory() -> None:
    """Release the memory of unreferenced tensors, on GPUs too if this process uses them."""
    gc.collect()
    torch.cuda.empty_cache()


def populate(address: int, size: int) -> None:
    """Ask the system to read mapped pages of a file into memory at once, if it supports that (Linux 5.14).

    Raises:
        OSError: the file cannot be read, or has become shorter.
    """
    if not size:
        return
    start = address - address % mmap.PAGESIZE
    length = address + size - start
    # Unlike mmap.madvise, this releases Python's global interpreter lock.
    library = ctypes.CDLL(None, use_errno=True)
    failed = library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_POPULATE_READ)
    if failed:
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            raise OSError(number, os.strerror(number))


def peak_memory() -> int:
    """Return the peak memory of this process since its start, in bytes.

    The ru_maxrss of getrusage(2) is not used: it starts at the value of the parent process. psutil does not report it.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            kibibytes = int(line.split()[1])
            return kibibytes * 1024
    raise OSError("/proc/self/status has no VmHWM")


_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")
_FILES = (  # limit, usage, and the field of memory.stat with file cache that the kernel drops first; versions 2 and 1
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def memory_left(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """Return the bytes that the control groups of this process still allow, or None without a limit.

    Args:
        root: mount point of control groups.
        membership: file with the groups of this process, a line for each hierarchy: ``number:controllers:path``.
    """
    sizes = []
    for group, (limit, usage, cache) in product(_groups(root, membership), _FILES):
        with suppress(OSError, ValueError):  # a ValueError means no limit: "max"
            maximum = int((group / limit).read_text(encoding="ascii"))
            used = int((group / usage).read_text(encoding="ascii"))
            statistics = (group / "memory.stat").read_text(encoding="ascii")
            fields = dict(line.split() for line in statistics.splitlines())
            sizes.append(max(0, maximum - used + int(fields.get(cache, 0))))
    return min(sizes, default=None)


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory groups and of their parents. Each has a limit of its own."""
    # Inside a container, its own group is the root.
    yield root
    yield root / "memory"
    if not membership.exists():
        return
    for line in membership.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base = root / "memory"  # version 1 has a hierarchy for each controller
        elif not controllers:
            base = root  # version 2 has one for all
        else:
            continue
        group = PurePath(path.strip("/"))
        for part in (group, *group.parents):
            yield base / part


T = TypeVar("T")

OUT_OF_MEMORY = (
    "out of memory",  # "CUDA error: out of memory", "HIP out of memory"; of NCCL "Cuda failure 2 'out of memory'"
    "_STATUS_ALLOC_FAILED",  # CUBLAS, CUSOLVER, CUSPARSE, CUDNN
    "not enough memory",  # torch's allocator on a CPU
    "can't allocate memory",
)


def halve_until_it_fits(
    measure: Callable[[int], T], rows: int, too_large: Callable[[int], BatchTooLarge], *, least: int = 1
) -> tuple[T, int]:
    """Call ``measure(rows)``, with half the rows again and again while they do not fit in memory.

    Args:
        measure: must leave no state behind when it fails.
        too_large: returns the error for a number of rows that does not fit.
        least: minimum number of rows.

    Returns:
        The result, and the number of rows that fitted.

    Raises:
        BatchTooLarge: ``least`` rows do not fit.
    """
    while True:
        try:
            return measure(rows), rows
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if rows <= least:
                raise too_large(rows) from None
        rows = (rows + 1) // 2
        free_cached_memory()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out: by its type, or by a text of CUDA, ROCm, NCCL, cuBLAS or the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
