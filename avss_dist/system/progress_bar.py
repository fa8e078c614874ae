"""Progress bar for loops that take seconds, or reports to a callback that shows a larger one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from avss_dist.system.streams import console

Item = TypeVar("Item")
ProgressCallback = Callable[[str, float], None]
"""Receives the current activity, and the share of it that is done (0 to 1)."""
_CALLBACK: ContextVar[ProgressCallback | None] = ContextVar("progress_callback", default=None)


@contextmanager
def progress_to(callback: ProgressCallback) -> Iterator[None]:
    """Make `tracked` call a callback inside the block instead of showing a bar."""
    token = _CALLBACK.set(callback)
    try:
        yield
    finally:
        _CALLBACK.reset(token)


def tracked(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Return the items with a progress bar on standard error, if it is a terminal. The bar disappears at the end."""
    if (callback := _CALLBACK.get()) is not None:
        return _reported(items, what, callback)
    if not items or not sys.stderr.isatty():
        return items
    from rich.progress import track

    return track(items, what, console=console(stderr=True), transient=True)


def underway(items: Sequence[Item], what: str) -> Iterable[Item]:
    """Return the items as `tracked` does, without a bar where no callback shows the progress."""
    return items if _CALLBACK.get() is None else tracked(items, what)


def report(what: str, share: float) -> None:
    """Pass the share of an activity that is done to the callback of `progress_to`, if there is one."""
    if (callback := _CALLBACK.get()) is not None:
        callback(what, share)


def _reported(items: Sequence[Item], what: str, callback: ProgressCallback) -> Iterator[Item]:
    for number, item in enumerate(items):
        callback(what, number / len(items))
        yield item
