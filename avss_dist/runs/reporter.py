"""What is reported while runs are planned and measured."""

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
    """Hears how the runs go, and says nothing: subclasses show what they hear.

    The next run is planned while others are measured, so calls come from several threads, though never two at once for
    one run. ``name`` is the run's: its model, and its corpus where there are several.
    """

    def planning(self, name: str) -> None:
        """The run's text is being read and tokenized."""

    def repeated(self, name: str, first: str) -> None:
        """The run is the same as ``first``: the same model, text and settings. It is measured once."""

    def planned(self, name: str, planned: PlannedRun) -> None:
        """The run will be measured: its id, its settings and all else that is known before a weight is loaded."""

    def placed(self, name: str, placement: Placement) -> None:
        """How its replicas will be spread over devices."""

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """Its shards are about to be measured; an earlier attempt has measured ``done_tokens`` of ``num_tokens``."""

    def advanced(self, name: str, num_tokens: int) -> None:
        """A shard of ``num_tokens`` is measured and committed."""

    def finished(self, name: str, run: Run) -> None:
        """The run has ended; `Run.status` says how."""


class Reporters(Reporter):
    """Several, each of which hears everything, in their order."""

    def __init__(self, *reporters: Reporter) -> None:
        self._reporters = reporters

    def planning(self, name: str) -> None:
        """A run's text is read."""
        for one in self._reporters:
            one.planning(name)

    def repeated(self, name: str, first: str) -> None:
        """It is the same as another one."""
        for one in self._reporters:
            one.repeated(name, first)

    def planned(self, name: str, planned: PlannedRun) -> None:
        """It will be measured."""
        for one in self._reporters:
            one.planned(name, planned)

    def placed(self, name: str, placement: Placement) -> None:
        """How its replicas are spread."""
        for one in self._reporters:
            one.placed(name, placement)

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """Its shards are about to be measured."""
        for one in self._reporters:
            one.started(name, num_tokens, done_tokens)

    def advanced(self, name: str, num_tokens: int) -> None:
        """A shard is measured."""
        for one in self._reporters:
            one.advanced(name, num_tokens)

    def finished(self, name: str, run: Run) -> None:
        """It has ended."""
        for one in self._reporters:
            one.finished(name, run)


def describe_repeated(first: str) -> str:
    """Say that a run is the same as another one, ``first``."""
    return f"the same model, text and settings as {first}; measured once."


class LoggingReporter(Reporter):
    """Tells `logging`, as ``avss_dist`` at the level INFO: what functions do where no reporter is given."""

    def __init__(self) -> None:
        self._runs: dict[str, tuple[int, int, float]] = {}  # tokens that are measured, and in all, and the last line

    def planning(self, name: str) -> None:
        """A run's text is read."""
        LOGGER.info("%s: reading", name)

    def repeated(self, name: str, first: str) -> None:
        """It is the same as another one."""
        LOGGER.info("%s: %s", name, describe_repeated(first))

    def placed(self, name: str, placement: Placement) -> None:
        """How its replicas are spread."""
        LOGGER.info("%s: %s; %s", name, placement.partition, placement.why)

    def started(self, name: str, num_tokens: int, done_tokens: int) -> None:
        """Its shards are about to be measured."""
        self._runs[name] = done_tokens, num_tokens, time.monotonic()

    def advanced(self, name: str, num_tokens: int) -> None:
        """A shard is measured: a line, if the last one is long ago."""
        done, total, said = self._runs[name]
        done, now = done + num_tokens, time.monotonic()
        if now - said >= LOG_SECONDS:
            LOGGER.info("%s: %d of %d tokens", name, done, total)
            said = now
        self._runs[name] = done, total, said

    def finished(self, name: str, run: Run) -> None:
        """It has ended."""
        LOGGER.info("%s: %s", name, run.error or run.status)
