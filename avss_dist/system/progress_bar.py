"""A bar for what takes seconds in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TypeVar

from avss_dist.system.streams import console

Item = TypeVar("Item")


def tracked(items: Sequence[Item], what: str) -> Iterable[Item]:
    """The items, with a bar on standard error where that is a terminal; it goes when they are done."""
    if not items or not sys.stderr.isatty():
        return items
    from rich.progress import track

    return track(items, what, console=console(stderr=True), transient=True)
