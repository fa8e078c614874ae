"""numba's compiler as the kernels use it: without Python's lock, its results kept on disk where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Return a decorator that compiles a function.

    What is compiled is kept beside the module, or in the user's cache; where neither can be written, each process
    compiles for itself, which takes some seconds.
    """

    def compile_(function: Any) -> Any:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", **options)(function)
        except RuntimeError:  # numba: no locator available
            return njit(nogil=True, error_model="numpy", **options)(function)

    return compile_
