"""Pace of work: its rate and the time that is left, known once the pace is steady."""

from __future__ import annotations

import time
from collections import deque

MIN_UNITS = 3  # units after the warm-up
WARM_UP_SHARE = 0.25  # of the time until the first unit: units that come so soon after it were begun with it
STEADY_FACTOR = 1.3  # between the rates of the earlier and the later half
REMEMBERED = 200  # units


class Pace:
    """The rate of units that are finished one after the other, or several at a time.

    The first unit waits for what is loaded and compiled, so the units that were begun with it do not count.

    Args:
        start: start of the work, in seconds of `time.monotonic`.
    """

    def __init__(self, start: float | None = None) -> None:
        self._start = time.monotonic() if start is None else start
        self._warm: tuple[float, float] | None = None  # the end of the warm-up, and the amount that was done then
        self._settled = 0.0
        self._done = 0.0
        self._units: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # times, and amounts that were done then
        self._steady = False

    def advance(self, amount: float, now: float | None = None) -> None:
        """Count a finished unit.

        Args:
            amount: its part of the whole, such as its tokens.
            now: time of its end, in seconds of `time.monotonic`.
        """
        now = time.monotonic() if now is None else now
        self._done += amount
        if self._warm is None:
            self._settled = now + WARM_UP_SHARE * (now - self._start)
        if self._warm is None or now <= self._settled:
            self._warm = now, self._done
            return
        self._units.append((now, self._done))
        self._steady = self._steady or self._is_steady()

    def rate(self) -> float | None:
        """Return the amount per second, or None while it is not steady."""
        if not self._steady or self._warm is None:
            return None
        begin = self._warm if len(self._units) < REMEMBERED else self._units[0]
        return _rate(begin, self._units[-1])

    def seconds_left(self, amount: float, now: float | None = None) -> float | None:
        """Return the seconds until a further amount is done, or None while the rate is not steady."""
        if not (rate := self.rate()):
            return None
        now = time.monotonic() if now is None else now
        return max(0.0, amount / rate - (now - self._units[-1][0]))

    def _is_steady(self) -> bool:
        if len(self._units) < MIN_UNITS or self._warm is None:
            return False
        middle = self._units[len(self._units) // 2 - 1]
        rates = _rate(self._warm, middle), _rate(middle, self._units[-1])
        return max(rates) <= STEADY_FACTOR * min(rates)


def _rate(begin: tuple[float, float], end: tuple[float, float]) -> float:
    return (end[1] - begin[1]) / max(end[0] - begin[0], 1e-9)
