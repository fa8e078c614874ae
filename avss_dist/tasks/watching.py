"""What sees the hidden states and the gradients of one batch, by hooks that find it in the context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from avss_dist.system.context import bound


class Watched:
    """One pass; see `causal_lm.Watching`."""

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Inside, hooks find it."""
        with bound(WATCHED, self):
            yield


WATCHED: ContextVar[Any] = ContextVar("watched", default=None)
