"""Threads and cores: how many threads compute one thing, and how many cores are free for more."""

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
    """Have torch compute with so many threads what this thread computes from now on, whatever the environment says.

    OpenMP keeps the number for each thread of Python, MKL and torch for the process: every thread that computes calls
    this, with the same number.
    """
    torch.set_num_threads(threads)


@contextmanager
def computing_threads(threads: int) -> Iterator[None]:
    """`use_threads` inside; the caller's number afterwards."""
    before = torch.get_num_threads()
    use_threads(threads)
    try:
        yield
    finally:
        use_threads(before)


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group; at least 1."""
    cores = len(os.sched_getaffinity(0))
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            cores = min(cores, int(quota) // int(period))
    return max(1, cores)


def free_cores() -> int:
    """Of the cores that this process may use, those that nobody uses now; at least 1."""
    usable = usable_cores()
    if usable == 1:
        return 1
    every = psutil.cpu_count() or usable
    busy = every * psutil.cpu_percent(interval=SAMPLE_SECONDS) / 100
    return max(1, min(usable, round(every - busy)))
