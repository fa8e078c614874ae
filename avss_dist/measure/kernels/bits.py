"""Values and bit patterns of the elements that the loops read: float32, or the uint16 pattern of a bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload


def value(element: Any) -> float:
    """Return the value of an element as float64. Only callable from compiled code."""
    raise NotImplementedError


def pattern(element: Any) -> np.uint32:
    """Return the float32 pattern of an element. Only callable from compiled code."""
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
