"""Elements as the loops read them, float32 or the uint16 pattern of a bfloat16: their values and their bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload


def value(element: Any) -> float:
    """Return an element as float64; compiled only."""
    raise NotImplementedError


def pattern(element: Any) -> np.uint32:
    """Return an element's float32 pattern; compiled only."""
    raise NotImplementedError


@overload(value, strict=False)
def _value(element: Any) -> Callable[[Any], Any]:
    if isinstance(element, types.Float):
        return lambda element: np.float64(element)
    return lambda element: np.float64(np.uint32(np.uint32(element) << 16).view(np.float32))


@overload(pattern, strict=False)
def _pattern(element: Any) -> Callable[[Any], Any]:
    if isinstance(element, types.Float):
        return lambda element: np.float32(element).view(np.uint32)
    return lambda element: np.uint32(np.uint32(element) << 16)
