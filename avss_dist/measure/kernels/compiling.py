"""numba's compiler with the options of the kernels: without Python's lock, and with a cache on disk if possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Return a decorator that compiles a function.

    The compiled code is cached beside the module or in the user's cache. If neither can be written, each process
    compiles for itself, which takes some seconds.
    """

    def compile_(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # numba: no locator available
            return njit(nogil=True, error_model="numpy", **options)(function)

    return compile_
