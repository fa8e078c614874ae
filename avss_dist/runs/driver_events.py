"""Events by which the planner, the executor's thread and the committer tell a driver what they have done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from avss_dist.core.errors import AvssError
from avss_dist.runs.folder_watch import Arrival
from avss_dist.runs.in_progress import RunInProgress
from avss_dist.runs.planned import PlannedRun
from avss_dist.runs.result import Run
from avss_dist.runs.run_state import TrackedRun
from avss_dist.runs.work import RunOutcome, RunShards


@dataclass(frozen=True)
class Planned:
    """Event of the planner: a run has a plan."""

    tracked: TrackedRun
    planned: PlannedRun


@dataclass(frozen=True)
class LookedUp:
    """Event of the planner: it is known what is stored of a run. Without ``progress``, it was done before."""

    tracked: TrackedRun
    progress: RunInProgress | None


@dataclass(frozen=True)
class Arrived:
    """Event of the planner: a watch has found a checkpoint, or has ended."""

    arrival: Arrival


@dataclass(frozen=True)
class Taken:
    """Event of the executor: it begins to measure a run."""

    shards: RunShards


@dataclass(frozen=True)
class Measured:
    """Event of the executor: a result of a run, a note on it, or the error that ends it.

    Attributes:
        arrived: time when it came, by ``time.perf_counter``.
    """

    shards: RunShards
    outcome: RunOutcome
    arrived: float


@dataclass(frozen=True)
class MeasuringEnded:
    """Event of the executor: it measures nothing any more. ``error`` is why, unless it has measured all."""

    error: BaseException | None


@dataclass(frozen=True)
class Stored:
    """Event of the committer: a shard of a run is stored."""

    tracked: TrackedRun
    num_tokens: int


@dataclass(frozen=True)
class Finished:
    """Event of the committer: a run is merged, scored and stored."""

    tracked: TrackedRun
    result: Run


@dataclass(frozen=True)
class FailureRecorded:
    """Event of the committer: the warehouse says that a run has failed, if it could be written."""

    tracked: TrackedRun


@dataclass(frozen=True)
class JobFailed:
    """Event of the planner or the committer: an error instead of the event of a job."""

    tracked: TrackedRun
    error: AvssError


@dataclass(frozen=True)
class JobInterrupted:
    """Event of the planner or the committer: an interrupt was raised in a job, or an error in a watch."""

    interrupt: BaseException


RunProgress: TypeAlias = Planned | LookedUp | Stored | Finished | FailureRecorded | JobFailed
"""Events of jobs that are of one run."""
DriverEvent: TypeAlias = RunProgress | Arrived | Taken | Measured | MeasuringEnded | JobInterrupted
