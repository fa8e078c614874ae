"""A bar for what takes seconds in this process; or whoever shows a larger one hears of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from avss_dist.system.streams import console

Item = TypeVar("Item")
Hear = Callable[[str, float], None]
"""Hears what goes on, and which share of it is done."""
_HEARD_BY: ContextVar[Hear | None] = ContextVar("heard_by", default=None)


@contextmanager
def heard_by(hear: Hear) -> Iterator[None]:
    """Inside, `tracked` has no bar of its own, and ``hear`` is called instead."""
    token = _HEARD_BY.set(hear)
    try:
        yield
    finally:
        _HEARD_BY.reset(token)


def tracked(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on standard error where that is a terminal; it goes when they are done."""
    if (hear := _HEARD_BY.get()) is not None:
        return _reported(items, what, hear)
    if not items or not sys.stderr.isatty():
        return items
    from rich.progress import track

    return track(items, what, console=console(stderr=True), transient=True)


def _reported(items: Sequence[Item], what: str, hear: Hear) -> Iterator[Item]:
    for number, item in enumerate(items):
        hear(what, number / len(items))
        yield item
