"""Who is alive. The actor's process imports this module alone, so it starts at once and stays small."""

from __future__ import annotations

import time


class HeartbeatMonitor:
    """The actor that knows when each worker last made progress."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[int, float]] = {}

    def report(self, worker: str, count: int) -> None:
        """Note how far a worker is."""
        if self._last.get(worker, (-1, 0.0))[0] != count:
            self._last[worker] = (count, time.monotonic())

    def ages(self) -> dict[str, float]:
        """Seconds since each worker last made progress."""
        now = time.monotonic()
        return {worker: now - seen for worker, (_, seen) in self._last.items()}
