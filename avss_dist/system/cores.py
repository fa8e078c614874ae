"""Threads of a computation, and cores that are free for more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")
SAMPLE_SECONDS = 0.2  # in which the load of others is measured


def use_threads(threads: int) -> None:
    """Set the number of threads with which torch computes in this Python thread, whatever the environment says.

    OpenMP keeps the number for each Python thread, MKL and torch for the process. Every thread that computes must call
    this with the same number.
    """
    torch.set_num_threads(threads)


@contextmanager
def computing_threads(threads: int) -> Iterator[None]:
    """Apply `use_threads` inside the block, and restore the previous number after it."""
    before = torch.get_num_threads()
    use_threads(threads)
    try:
        yield
    finally:
        use_threads(before)


def usable_cores() -> int:
    """Return the number of cores that this process may use, by its affinity and control group; at least 1."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def free_cores() -> int:
    """Return the number of cores that this process may use and that are idle now; at least 1."""
    usable = usable_cores()
    if usable == 1:
        return 1
    total = psutil.cpu_count() or usable
    busy = total * psutil.cpu_percent(interval=SAMPLE_SECONDS) / 100
    return max(1, min(usable, round(total - busy)))
