"""Who is alive. The actor's process imports this module alone, so it starts at once and stays small."""

from __future__ import annotations

import time
from typing import NamedTuple

Doing = tuple[str, float]
"""What a worker does, and which share of it is done."""


class Sign(NamedTuple):
    """What is known of a worker.

    Attributes:
        silence: seconds since it last made progress.
        age: seconds since it last reported.
        doing: what it did then, where it says so.
    """

    silence: float
    age: float
    doing: Doing | None


class HeartbeatMonitor:
    """The actor that knows when each worker last made progress, and what it does."""

    def __init__(self) -> None:
        self._progress: dict[str, tuple[int, float]] = {}
        self._reports: dict[str, tuple[Doing | None, float]] = {}

    def report(self, worker: str, count: int, doing: Doing | None = None) -> None:
        """Note how far a worker is."""
        now = time.monotonic()
        self._reports[worker] = doing, now
        if self._progress.get(worker, (-1, 0.0))[0] != count:
            self._progress[worker] = count, now

    def signs(self) -> dict[str, Sign]:
        """What is known of each worker."""
        now = time.monotonic()
        both = ((worker, seen, *self._reports[worker]) for worker, (_, seen) in self._progress.items())
        return {worker: Sign(now - seen, now - reported, doing) for worker, seen, doing, reported in both}
