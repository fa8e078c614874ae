"""Heartbeats of workers. The actor's process imports this module alone, so it starts at once and stays small."""

from __future__ import annotations

import time
from typing import NamedTuple

Doing = tuple[str, float]
"""A worker's current activity, and the share of it that is done (0 to 1)."""


class Sign(NamedTuple):
    """The latest known state of a worker.

    Attributes:
        silence: seconds since it last made progress.
        age: seconds since it last reported.
        doing: the activity that it reported, if any.
    """

    silence: float
    age: float
    doing: Doing | None


class Report(NamedTuple):
    """Signs of life of a worker, as it has reported them.

    Attributes:
        progress: the count of layers begun, or of seconds while it opens a model.
        since: monotonic time when it first reported this progress.
        reported_at: monotonic time of the last report.
        doing: its activity, if any.
    """

    progress: int
    since: float
    reported_at: float
    doing: Doing | None


class HeartbeatMonitor:
    """Actor that records each worker's last progress and its activity, and passes their events on."""

    def __init__(self) -> None:
        self._events: dict[str, list[object]] = {}
        self._reports: dict[str, Report] = {}

    def report(self, worker: str, count: int, doing: Doing | None = None) -> None:
        """Record the progress of a worker: a count that grows, and its activity."""
        now = time.monotonic()
        last = self._reports.get(worker)
        since = now
        if last is not None and last.progress == count:
            since = last.since
        self._reports[worker] = Report(progress=count, since=since, reported_at=now, doing=doing)

    def signs(self) -> dict[str, Sign]:
        """Return the latest known state of each worker."""
        now = time.monotonic()
        signs = {}
        for worker, report in self._reports.items():
            signs[worker] = Sign(silence=now - report.since, age=now - report.reported_at, doing=report.doing)
        return signs

    def tell(self, worker: str, event: object) -> None:
        """Keep an event of a worker until it is taken."""
        self._events.setdefault(worker, []).append(event)

    def take_events(self, worker: str) -> list[object]:
        """Return the events of a worker since the last call, in order."""
        return self._events.pop(worker, [])
