"""States of the runs of one command, the steps between them, and the record that a driver keeps of each run."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from enum import Enum

from avss_dist.core.errors import AvssError
from avss_dist.runs.in_progress import RunInProgress
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.result import Run


class RunState(Enum):
    """Where a run is, from its turn to its end."""

    WAITING = "waits for its turn to be planned"
    PLANNING = "is being planned, and its stored shards are looked up"
    REPEATING = "is the same run as an earlier one of the command, and ends after it"
    PLANNED = "was submitted to the executor"
    MEASURING = "is measured by the executor, and its results are stored as they come"
    COMMITTING = "needs no further result: those that came are stored, then it is merged, or its failure is recorded"
    DONE = "is stored with its scores"
    SKIPPED = "was done before"
    FAILED = "ended with an error"


NEXT_STATES: Mapping[RunState, Set[RunState]] = {
    RunState.WAITING: {RunState.PLANNING},
    RunState.PLANNING: {
        RunState.REPEATING,
        RunState.PLANNED,
        RunState.COMMITTING,  # all of its shards are stored
        RunState.SKIPPED,
        RunState.FAILED,
    },
    RunState.REPEATING: {RunState.SKIPPED, RunState.FAILED},
    RunState.PLANNED: {RunState.MEASURING, RunState.COMMITTING},
    RunState.MEASURING: {RunState.COMMITTING},
    RunState.COMMITTING: {RunState.DONE, RunState.FAILED},
    RunState.DONE: set(),
    RunState.SKIPPED: set(),
    RunState.FAILED: set(),
}
"""The states that may follow each state."""

# Tuples: a state is compared by identity, where a set would hash it, for each result.
NOT_TAKEN = RunState.PLANNING, RunState.PLANNED
UNMEASURED: tuple[RunState, ...] = (*NOT_TAKEN, RunState.MEASURING)
IN_PROGRESS = RunState.PLANNED, RunState.MEASURING, RunState.COMMITTING
ENDED = RunState.DONE, RunState.SKIPPED, RunState.FAILED


@dataclass(eq=False)
class TrackedRun:
    """Record that a driver keeps of one run. The thread of the driver alone reads and writes it.

    Attributes:
        first: the earlier run that it repeats.
        progress: writes its results, while it is in progress.
        awaited: ids of the shards without a result.
        writing: number of results that the committer has and has not stored.
        begun: when the first shard of this attempt was begun, by ``time.perf_counter``.
        notes: what happened while it was measured, such as lost nodes, for its row.
        error: its first error, which ends it.
        result: the run as it is planned, or done.
    """

    spec: RunSpec
    state: RunState = RunState.WAITING
    first: TrackedRun | None = None
    progress: RunInProgress | None = None
    awaited: set[int] = field(default_factory=set)
    writing: int = 0
    begun: float | None = None
    notes: list[str] = field(default_factory=list)
    error: AvssError | None = None
    result: Run | None = None

    def become(self, state: RunState) -> None:
        """Take the next state.

        Raises:
            RuntimeError: it cannot follow the present one.
        """
        if state not in NEXT_STATES[self.state]:
            raise RuntimeError(f"{self.spec.name} is {self.state.name}, which {state.name} cannot follow.")
        self.state = state

    @property
    def is_in_progress(self) -> bool:
        """Whether it has begun and has not ended."""
        return self.state in IN_PROGRESS

    @property
    def has_ended(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self.state in ENDED

    def awaits(self, shard_id: int) -> bool:
        """Return whether the result of a shard is still needed."""
        return self.state is RunState.MEASURING and shard_id in self.awaited

    @property
    def is_stored(self) -> bool:
        """Whether every shard is stored, and no error has come."""
        is_complete = not self.awaited and not self.writing
        return is_complete and self.error is None

    @property
    def ending(self) -> Run | AvssError:
        """The run, or the error that ended it."""
        if self.error is not None:
            return self.error
        assert self.result is not None, "the run has not ended"
        return self.result
