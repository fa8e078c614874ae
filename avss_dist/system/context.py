"""Values of context variables, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def bound(variable: ContextVar[T], value: T) -> Iterator[None]:
    """Set a context variable inside the block, and restore its value after it."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
