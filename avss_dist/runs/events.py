"""Events that runs pass to a callback, and the callback that logs them. This module does not import torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from avss_dist.partition.replica import Placement
    from avss_dist.runs.run import Run


E = TypeVar("E")
LOGGER = logging.getLogger("avss_dist")
LOGGER.addHandler(logging.NullHandler())
LOG_SECONDS = 30.0  # between two lines about one run, at least


@dataclass(frozen=True)
class RunEvent:
    """An event of a run, whose ``name`` is its model, with its corpus if there are several.

    The next run is planned while others are measured, so events come from several threads, though never two at once
    for one run.
    """

    name: str


@dataclass(frozen=True)
class RunReading(RunEvent):
    """The start of planning a run, before its text is read and tokenized."""


@dataclass(frozen=True)
class RunRepeated(RunEvent):
    """A run with the same model, text and settings as the run named ``first``. It is measured once."""

    first: str

    def describe(self, first: str = "") -> str:
        """Return a sentence that says which run it repeats, by another name if one is given."""
        return f"the same model, text and settings as {first or self.first}; measured once."


@dataclass(frozen=True)
class RunPlaced(RunEvent):
    """The placement of a run's replicas on devices."""

    placement: Placement


@dataclass(frozen=True)
class RunStarted(RunEvent):
    """The start of measuring ``num_tokens`` tokens, of which an earlier attempt has measured ``done_tokens``."""

    num_tokens: int
    done_tokens: int


@dataclass(frozen=True)
class ShardMeasured(RunEvent):
    """A measured and committed shard of ``num_tokens`` tokens."""

    num_tokens: int


@dataclass(frozen=True)
class RunEnded(RunEvent):
    """The end of a run, with its `Run.status`."""

    run: Run


OnRunEvent = Callable[[RunEvent], None]


def both(first: Callable[[E], None], second: Callable[[E], None]) -> Callable[[E], None]:
    """Return a callback that passes each event to two callbacks in order."""

    def pass_on(event: E) -> None:
        first(event)
        second(event)

    return pass_on


class LogRuns:
    """Callback that logs the events of runs to the logger ``avss_dist`` at level INFO.

    Functions use it by default.
    """

    def __init__(self) -> None:
        self._runs: dict[str, tuple[int, int, float]] = {}  # measured tokens, all tokens, time of the last line

    def __call__(self, event: object) -> None:
        """Log an event. The progress of a run is logged at most every `LOG_SECONDS`."""
        match event:
            case RunReading(name):
                LOGGER.info("%s: reading", name)
            case RunRepeated(name):
                LOGGER.info("%s: %s", name, event.describe())
            case RunPlaced(name, placement):
                LOGGER.info("%s: %s; %s", name, placement.partition, placement.why)
            case RunStarted(name, num_tokens, done_tokens):
                self._runs[name] = done_tokens, num_tokens, time.monotonic()
            case ShardMeasured(name, num_tokens):
                done, total, logged_at = self._runs[name]
                done, now = done + num_tokens, time.monotonic()
                if now - logged_at >= LOG_SECONDS:
                    LOGGER.info("%s: %d of %d tokens", name, done, total)
                    logged_at = now
                self._runs[name] = done, total, logged_at
            case RunEnded(name, run):
                LOGGER.info("%s: %s", name, run.error or run.status)
