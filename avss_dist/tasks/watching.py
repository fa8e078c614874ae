"""Base of observers of one batch's hidden states and gradients, which hooks find in a context variable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from avss_dist.system.context import bound


class Watched:
    """Observer of one pass. See `causal_lm.Watching`."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Make this observer current for hooks inside the context."""
        with bound(WATCHED, self):
            yield


WATCHED: ContextVar[Any] = ContextVar("watched", default=None)
