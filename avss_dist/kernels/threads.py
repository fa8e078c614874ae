"""Threads for the CPU kernels: torch's own OpenMP team where it can be had, else a pool.

Between two of torch's operations its threads spin for milliseconds, so threads of another pool would fight them for the
cores. Run as one more parallel region of the same team, the kernels find those threads awake and waiting.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch

Task = Callable[[int], None]


class Team(Protocol):
    """Runs a task on several threads at once."""

    def run(self, task: Task, threads: int) -> None:
        """Call ``task(0)`` to ``task(threads - 1)``, each once; raise what one of them raised."""


@lru_cache(maxsize=1)
def team() -> Team:
    """The team of this process."""
    library = _libgomp()
    return OpenMP(library) if library else Pool()


def _libgomp() -> str | None:
    """The GNU OpenMP library that torch uses: the one in its folder, else the only one that is loaded, else None."""
    if not torch.backends.openmp.is_available():
        return None
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    loaded = {line.split()[-1] for line in maps.splitlines() if "/libgomp" in line}
    of_torch = {path for path in loaded if path.startswith(str(Path(torch.__file__).parent))}
    return next(iter(of_torch or (loaded if len(loaded) == 1 else ())), None)


class OpenMP:
    """A parallel region of GNU OpenMP (``GOMP_parallel``, its ABI for ``#pragma omp parallel``)."""

    def __init__(self, library: str) -> None:
        gomp = ctypes.CDLL(library)
        self._parallel = gomp.GOMP_parallel
        self._region = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
        self._parallel.argtypes = [self._region, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None
        self._thread, self._threads = gomp.omp_get_thread_num, gomp.omp_get_num_threads

    def run(self, task: Task, threads: int) -> None:
        """See `Team`. OpenMP may give fewer threads than asked for; then each takes several of the tasks."""
        errors: list[BaseException] = []

        def region(_: int | None) -> None:
            try:
                for i in range(self._thread(), threads, self._threads()):
                    task(i)
            except BaseException as error:  # it cannot cross the C frames; raised below
                errors.append(error)

        self._parallel(self._region(region), None, threads, 0)
        if errors:
            raise errors[0]


class Pool:
    """Threads of our own."""

    def run(self, task: Task, threads: int) -> None:
        """See `Team`."""
        others = [_executor(threads).submit(task, i) for i in range(1, threads)]
        task(0)
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="avss-kernels")
