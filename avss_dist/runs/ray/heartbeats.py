"""Heartbeats of workers. The actor's process imports this module alone, so it starts at once and stays small."""

from __future__ import annotations

import time
from typing import Any

Doing = tuple[str, float]
"""A worker's current activity, and the share of it that is done (0 to 1)."""


Sign = tuple[float, float, Doing | None]
"""Seconds since a worker last made progress, and since it last reported, and the activity that it reported, if any."""


class HeartbeatMonitor:
    """Actor that records each worker's last progress and its activity, and passes their events on."""

    def __init__(self) -> None:
        self._events: dict[str, list[Any]] = {}
        self._reports: dict[str, tuple[int, float, float, Doing | None]] = {}  # count, since when, report, activity

    def report(self, worker: str, count: int, doing: Doing | None = None) -> None:
        """Record the progress of a worker: a count that grows, and its activity."""
        now = time.monotonic()
        last, since, *_ = self._reports.get(worker, (count, now))
        self._reports[worker] = count, since if count == last else now, now, doing

    def signs(self) -> dict[str, Sign]:
        """Return the latest known state of each worker."""
        now = time.monotonic()
        return {
            worker: (now - since, now - reported, doing)
            for worker, (_, since, reported, doing) in self._reports.items()
        }

    def tell(self, worker: str, event: Any) -> None:
        """Keep an event of a worker until it is taken."""
        self._events.setdefault(worker, []).append(event)

    def take_events(self, worker: str) -> list[Any]:
        """Return the events of a worker since the last call, in order."""
        return self._events.pop(worker, [])
