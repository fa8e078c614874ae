"""Threads for the CPU kernels: torch's own OpenMP team where it can be had, else a pool.

Between two of torch's operations its threads spin for milliseconds, so threads of another pool would fight them for the
cores. Run as one more parallel region of the same team, the kernels find those threads awake and waiting.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import torch


class Team(Protocol):
    """Runs a compiled function on several threads at once."""

    def run(self, function: int, argument: int, threads: int) -> None:
        """Call the C function ``void f(void *)`` at an address with an argument, on at most ``threads`` threads."""


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
        self._parallel = ctypes.CDLL(library).GOMP_parallel
        self._parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._parallel.restype = None

    def run(self, function: int, argument: int, threads: int) -> None:
        """See `Team`. OpenMP may give fewer threads than asked for."""
        self._parallel(function, argument, threads, 0)


class Pool:
    """Threads of our own."""

    def run(self, function: int, argument: int, threads: int) -> None:
        """See `Team`."""
        call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)
        others = [_executor(threads).submit(call, argument) for _ in range(1, threads)]
        call(argument)
        for other in others:
            other.result()


@lru_cache(maxsize=1)
def _executor(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="avss-kernels")
