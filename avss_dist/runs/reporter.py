"""Progress callbacks of runs."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from avss_dist.partition.base import Placement
    from avss_dist.runs.run import PlannedRun, Run


LOGGER = logging.getLogger("avss_dist")
LOGGER.addHandler(logging.NullHandler())
LOG_SECONDS = 10.0  # between two lines about one run, at least


class Reporter:
    """Progress callbacks of runs, which do nothing. Subclasses show the progress.

    The next run is planned while others are measured, so calls come from several threads, though never two at once for
    one run. ``name`` is the name of the run: its model, and its corpus if there are several.
    """

    def planning(self, name: str) -> None:
        """Called before the run's text is read and tokenized."""

    def repeated(self, name: str, first: str) -> None:
        """Called if the run has the same model, text and settings as ``first``. It is measured once."""

    def planned(self, name: str, planned: PlannedRun) -> None:
        """Called before the run is measured, when all but its results is known."""

    def placed(self, name: str, placement: Placement) -> None:
        """Called when the placement of its replicas on devices is known."""

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """Called before its shards are measured. An earlier attempt has measured ``done_tokens`` of ``num_tokens``."""

    def advanced(self, name: str, num_tokens: int) -> None:
        """Called after a shard of ``num_tokens`` was measured and committed."""

    def finished(self, name: str, run: Run) -> None:
        """Called after the run has ended, with its `Run.status`."""


class Reporters(Reporter):
    """Several reporters, called in order."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def planning(self, name: str) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.planning(name)

    def repeated(self, name: str, first: str) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.repeated(name, first)

    def planned(self, name: str, planned: PlannedRun) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.planned(name, planned)

    def placed(self, name: str, placement: Placement) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.placed(name, placement)

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.started(name, num_tokens, done_tokens)

    def advanced(self, name: str, num_tokens: int) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.advanced(name, num_tokens)

    def finished(self, name: str, run: Run) -> None:
        """See `Reporter`."""
        for reporter in self._reporters:
            reporter.finished(name, run)


def describe_repeated(first: str) -> str:
    """Return a sentence that says that a run repeats another one, ``first``."""
    return f"the same model, text and settings as {first}; measured once."


class LoggingReporter(Reporter):
    """Reporter to the logger ``avss_dist`` at level INFO. It is the default of Python functions."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[int, int, float]] = {}  # measured tokens, all tokens, time of the last line

    def planning(self, name: str) -> None:
        """See `Reporter`."""
        LOGGER.info("%s: reading", name)

    def repeated(self, name: str, first: str) -> None:
        """See `Reporter`."""
        LOGGER.info("%s: %s", name, describe_repeated(first))

    def placed(self, name: str, placement: Placement) -> None:
        """See `Reporter`."""
        LOGGER.info("%s: %s; %s", name, placement.partition, placement.why)

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """See `Reporter`."""
        self._runs[name] = done_tokens, num_tokens, time.monotonic()

    def advanced(self, name: str, num_tokens: int) -> None:
        """Log the progress, at most every `LOG_SECONDS`."""
        done, total, logged_at = self._runs[name]
        done, now = done + num_tokens, time.monotonic()
        if now - logged_at >= LOG_SECONDS:
            LOGGER.info("%s: %d of %d tokens", name, done, total)
            logged_at = now
        self._runs[name] = done, total, logged_at

    def finished(self, name: str, run: Run) -> None:
        """See `Reporter`."""
        LOGGER.info("%s: %s", name, run.error or run.status)
