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

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
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
    start = address - address % mmap.PAGESIZE
    pages = ctypes.c_void_p(start), ctypes.c_size_t(address + size - start)
    # Unlike mmap.madvise, this releases Python's global interpreter lock.
    failed = size and ctypes.CDLL(None, use_errno=True).madvise(*pages, _MADV_POPULATE_READ)
    if failed:
        number = ctypes.get_errno()
        if number != errno.EINVAL:
            raise OSError(number, os.strerror(number))


def peak_memory() -> int:
    """Return the peak memory of this process since its start, in bytes.

    The ru_maxrss of getrusage(2) is not used: it starts at the value of the parent process. psutil does not report it.
    """
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


_ROOT, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
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
            maximum, used = (int((group / name).read_text(encoding="ascii")) for name in (limit, usage))
            fields = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
            sizes.append(max(0, maximum - used + int(fields.get(cache, 0))))
    return min(sizes, default=None)


def _groups(root: Path, membership: Path) -> Iterator[Path]:
    """Yield the folders of this process's memory groups and of their parents. Each has a limit of its own."""
    yield from (root, root / "memory")  # inside a container, its own group is the root
    lines = membership.read_text(encoding="utf-8").splitlines() if membership.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        base = root / "memory" if "memory" in controllers.split(",") else root
        if base != root or not controllers:
            group = PurePath(path.strip("/"))
            yield from (base / part for part in (group, *group.parents))


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
