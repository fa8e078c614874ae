"""Events that runs pass to a callback, the callback that writes lines, and the pace of work. No torch is imported."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from avss_dist.core.text import describe_seconds
from avss_dist.partition.catalog import WHOLE

if TYPE_CHECKING:
    from avss_dist.partition.placement import Placement
    from avss_dist.runs.result import Run


E = TypeVar("E")
LOGGER = logging.getLogger("avss_dist")
LOGGER.addHandler(logging.NullHandler())
LOG_SECONDS = 30.0  # between two lines about one run, at least


@dataclass(frozen=True)
class RunEvent:
    """An event of a run, whose ``name`` is its model, with its corpus if there are several.

    All events come in the thread that called `score`, `score_all` or `run_job`.
    """

    name: str


@dataclass(frozen=True)
class RunReading(RunEvent):
    """The start of planning a run, before its text is read and tokenized."""


@dataclass(frozen=True)
class RunStarted(RunEvent):
    """The start of measuring ``num_tokens`` tokens, of which an earlier attempt has measured ``done_tokens``.

    Attributes:
        placement: placement of the run's replicas on devices.
    """

    num_tokens: int
    done_tokens: int
    placement: Placement


@dataclass(frozen=True)
class ShardMeasured(RunEvent):
    """A measured and committed shard of ``num_tokens`` tokens."""

    num_tokens: int


@dataclass(frozen=True)
class RunEnded(RunEvent):
    """The end of a run, with its `Run.status`.

    Attributes:
        repeats: name of the run with the same model, text and settings, which is measured in its place; usually empty.
    """

    run: Run
    repeats: str = ""


@dataclass(frozen=True)
class WatchNote(RunEvent):
    """A remark of a watch, whose ``name`` is its globs.

    Attributes:
        text: a sentence.
    """

    text: str


OnRunEvent = Callable[[RunEvent], None]


def describe_repeated(name: str) -> str:
    """Return a description of a run that repeats the run with this name."""
    return f"the same model, text and settings as {name}; measured once."


def both(first: Callable[[E], None], second: Callable[[E], None]) -> Callable[[E], None]:
    """Return a callback that passes each event to two callbacks in order."""

    def pass_on(event: E) -> None:
        first(event)
        second(event)

    return pass_on


class Pace:
    """The rate of some work since its beginning, and the time that is left.

    Args:
        total, done: amount of the work, and of what was done before.
        unit: what is counted, a plural.
        now: the beginning, in seconds of `time.monotonic`.
    """

    def __init__(self, total: float = 1.0, done: float = 0, unit: str = "", *, now: float | None = None) -> None:
        self.total = total
        self.done = done
        self._unit = unit
        self._before = done
        self._start = time.monotonic() if now is None else now
        self._last = self._start

    def reach(self, done: float, now: float | None = None) -> None:
        """Count the work up to ``done``, if it is more than before."""
        if done > self.done:
            self.done = done
            self._last = time.monotonic() if now is None else now

    @property
    def rate(self) -> float:
        """Amount per second, until the last of the work that is done, or 0 before any is."""
        return (self.done - self._before) / max(self._last - self._start, 1e-9)

    def seconds_left(self, now: float | None = None) -> float | None:
        """Return the seconds until all is done, or None before anything is."""
        rate = self.rate
        if not rate:
            return None
        if now is None:
            now = time.monotonic()
        return max(0.0, (self.total - self.done) / rate - (now - self._last))

    def describe(self) -> str:
        """Return the rate, if there is a unit, and the time that is left, after a comma each, or nothing at first."""
        seconds = self.seconds_left()
        if seconds is None:
            return ""
        left = f", {describe_seconds(seconds)} left"
        if not self._unit:
            return left
        if self.rate >= 1:
            return f", {self.rate:,.0f} {self._unit}/s{left}"
        return f", {60 * self.rate:.2g} {self._unit}/min{left}"


class LogRuns:
    """Callback for the events of runs that writes lines: one at the end of each run, and a few between.

    Functions use it by default, and write to the logger ``avss_dist`` at level INFO.

    Args:
        write: writes a line.
        num_runs: number of runs; their ends are counted if it is known.
        ends: write a line at the end of each run.
    """

    def __init__(
        self, write: Callable[[str], None] = LOGGER.info, num_runs: int | None = None, *, ends: bool = True
    ) -> None:
        self._write = write
        self._num_runs = num_runs
        self._ends = ends
        self._ended = 0
        self._paces: dict[str, Pace] = {}
        self._logged_at = time.monotonic()

    def __call__(self, event: object) -> None:
        """Write what an event says. The progress of runs has a line every `LOG_SECONDS` at most.

        The distribution of a replica is written if it is not a single whole model.
        """
        match event:
            case WatchNote(_, text):
                self._write(text)
            case RunStarted(name, num_tokens, done_tokens, placement):
                if placement.partition != WHOLE:
                    self._write(f"{name}: {placement.partition}; {placement.why}.")
                self._paces[name] = Pace(num_tokens, done_tokens, "tokens")
            case ShardMeasured(name, num_tokens):
                pace = self._paces[name]
                pace.reach(pace.done + num_tokens)
                if time.monotonic() - self._logged_at >= LOG_SECONDS:
                    self._logged_at = time.monotonic()
                    share = pace.done / (pace.total or 1)
                    self._write(f"{name}: {share:.0%} of {pace.total:,} tokens{pace.describe()}")
            case RunEnded(name, result, repeats):
                if repeats:
                    self._write(f"{name}: {describe_repeated(repeats)}")
                self._paces.pop(name, None)
                self._ended += 1
                if self._ends:
                    count = f"{self._ended} of {self._num_runs} runs: " if self._num_runs else ""
                    error = f": {result.error.splitlines()[0]}" if result.error else ""
                    self._write(f"{count}{name} {result.status}{error}")
