"""Runs, a warehouse and an executor in memory, for a driver with its real threads: a pool on a simulated cluster."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

from avss_dist.core.errors import AvssError, RunFailed, StorageFull
from avss_dist.runs.driver import Driver
from avss_dist.runs.events import RunEvent
from avss_dist.runs.folder_watch import Arrival
from avss_dist.runs.ray.pool import Pool, QueueSource
from avss_dist.runs.ray.queue import ShardQueue
from avss_dist.runs.result import Run
from avss_dist.runs.threads import Submissions
from avss_dist.runs.work import Outcome, Receipt, RunShards
from support.simulated_cluster import Dies, SimulatedCluster, SimulatedGang
from support.units import SHARDS, spec_of

WRITE_SECONDS = 0.002  # so that results wait for the committer


@dataclass(frozen=True, eq=False)
class Fate:
    """What happens to a run.

    Attributes:
        run_id: runs with the same id are the same run.
        shards: number of its shards.
        fails_in: step that fails: ``prepare``, ``begin``, ``measure``, ``store``, ``fill`` (the storage is full),
            ``finish``, or an empty string.
        fails_at: shard that fails, if a shard does.
        dies: whether the worker of the first shard dies once.
        was_done: whether an earlier command has done it.
    """

    run_id: str
    shards: int = 3
    fails_in: str = ""
    fails_at: int = 0
    dies: bool = False
    was_done: bool = False

    @property
    def name(self) -> str:
        """The name in events."""
        return self.run_id

    def failure(self) -> AvssError:
        """Return the error of the step that fails."""
        if self.fails_in == "fill":
            return StorageFull(f"No space for {self.run_id}.")
        return RunFailed(f"{self.run_id} fails to {self.fails_in}.")


class SimulatedWarehouse:
    """What is stored, in place of `warehouse.store.Store` and of its reader.

    Attributes:
        shards: ids of the stored shards, by run.
        rows: statuses that were written, by run, in order.
        refused: shards whose storage failed, by run.
    """

    root = "memory"

    def __init__(self) -> None:
        self.shards: defaultdict[str, set[int]] = defaultdict(set)
        self.rows: defaultdict[str, list[str]] = defaultdict(list)
        self.refused: defaultdict[str, set[int]] = defaultdict(set)

    @property
    def reader(self) -> SimulatedWarehouse:
        return self

    def num_partials(self, run_id: str) -> int:
        return len(self.shards[run_id])

    def state(self) -> tuple[Any, Any]:
        """Return a copy of all that is stored."""
        return {k: set(v) for k, v in self.shards.items()}, {k: list(v) for k, v in self.rows.items()}


class SimulatedProgress:
    """Writer of one run, in place of `runs.in_progress.RunInProgress`."""

    placement = None
    done_tokens = 0

    def __init__(self, fate: Fate, warehouse: SimulatedWarehouse) -> None:
        self._fate = fate
        self._warehouse = warehouse
        self.result = run_of(fate)
        self.run_id = fate.run_id
        self.shards = RunShards(run_id=fate.run_id, replica_spec=spec_of("model"), shards=SHARDS[: fate.shards])

    def store(self, result: Receipt) -> None:
        time.sleep(WRITE_SECONDS)
        if self._fate.fails_in in ("store", "fill") and result.shard_id == self._fate.fails_at:
            self._warehouse.refused[self._fate.run_id].add(result.shard_id)
            raise self._fate.failure()
        self._warehouse.shards[self._fate.run_id].add(result.shard_id)

    def finish(self, apply: Any, *, begun: float | None, notes: Sequence[str]) -> Run:
        assert len(self._warehouse.shards[self._fate.run_id]) == self._fate.shards, "a shard is missing"
        if self._fate.fails_in == "finish":
            raise self._fate.failure()
        self._warehouse.rows[self._fate.run_id].append("done")
        return run_of(self._fate, "done")

    def record_failure(self, error: AvssError) -> None:
        self._warehouse.rows[self._fate.run_id].append("failed")
        if self._fate.fails_in == "fill":
            raise OSError("no space for the row either")


def run_of(fate: Fate, status: str = "skipped") -> Run:
    return Run(run_id=fate.run_id, model=fate.name, warehouse="memory", status=status, num_shards=fate.shards)


class SimulatedPlanner:
    """Plans what fates say, in place of `runs.planner.Planner`.

    Attributes:
        read: ids of the runs whose checkpoints were read ahead.
    """

    def __init__(self, warehouse: SimulatedWarehouse) -> None:
        self.read: list[str] = []
        self._warehouse = warehouse

    def read_ahead(self, fate: Fate) -> None:
        self.read.append(fate.run_id)

    def prepare(self, fate: Fate) -> Any:
        if fate.fails_in == "prepare":
            raise fate.failure()
        return SimulatedPlan(fate)

    def begin(self, planned: SimulatedPlan, *, fresh: bool, storage_is_full: bool) -> SimulatedProgress | None:
        fate = planned.fate
        if fate.was_done:
            return None
        if fate.fails_in == "begin":
            raise fate.failure()
        if storage_is_full:
            raise StorageFull("Not begun.")
        return SimulatedProgress(fate, self._warehouse)


class SimulatedWatch:
    """Gives one run after the other, in place of `runs.folder_watch.FolderWatch`.

    Args:
        fates: the runs that come.
        ends: whether the watch ends after them. Otherwise it waits until it is closed.
    """

    def __init__(self, fates: Sequence[Fate], *, ends: bool = True) -> None:
        self._coming = list(fates)
        self._ends = ends
        self._closed = Event()

    def take(self) -> Arrival:
        if self._coming:
            specs: Any = (self._coming.pop(0),)
            return Arrival(specs, "one waits")
        if not self._ends:
            self._closed.wait()
        return Arrival()

    def explain(self, fate: Fate, error: AvssError) -> AvssError:
        return error

    def close(self) -> None:
        self._closed.set()


class SimulatedPlan:
    """A planned run."""

    def __init__(self, fate: Fate) -> None:
        self.fate = fate
        self.result = run_of(fate)
        self.run_id = fate.run_id


class SimulatedExecutor:
    """A pool on a simulated cluster, whose outcomes are noted.

    Args:
        crash_after: number of results after which the executor itself fails.

    Attributes:
        outcomes: outcomes that reached the driver's thread, by run, in order.
    """

    def __init__(self, fates: Sequence[Fate], *, plans_ahead: bool = True, crash_after: int | None = None) -> None:
        self.plans_ahead = plans_ahead
        self.outcomes: defaultdict[str, list[Any]] = defaultdict(list)
        self._fates = {fate.run_id: fate for fate in reversed(fates)}
        self._crash_after = crash_after
        self._died: set[str] = set()
        self.cluster = SimulatedCluster(2)
        self.cluster.on_measure = self._answer

    def connect(self) -> None:
        pass

    def apply(self, function: Any, items: Any) -> Any:
        return map(function, items)

    def _answer(self, gang: SimulatedGang, assignment: Any, rank: int) -> Any:
        fate = self._fates[assignment.run_id]
        shard = assignment.shard
        if fate.fails_in == "measure" and shard.shard_id == fate.fails_at:
            raise fate.failure()
        if fate.dies and fate.run_id not in self._died:
            self._died.add(fate.run_id)
            raise Dies("the process died")
        return Receipt(shard_id=shard.shard_id, num_tokens=shard.num_tokens, seconds=1.0, files={})

    def run(self, runs: Submissions[RunShards]) -> Iterator[Outcome]:
        pool = Pool(
            QueueSource(runs, lambda run: [ShardQueue(run)]),
            new_gang=self.cluster.new_gang,  # type: ignore[arg-type]
            replicas=lambda placement: 2,
            minimum=1,
            cluster=self.cluster,  # type: ignore[arg-type]
            placement_seconds=1e9,
            hang_seconds=30.0,
            shortage=lambda placement: "",
        )
        results = 0
        for run, outcome in pool.outcomes():
            if self._crash_after == results:
                raise OSError("the executor crashes")
            results += isinstance(outcome, Receipt)
            yield run, outcome
            self.outcomes[run.run_id].append(outcome)  # The driver's thread has received it.


@dataclass
class Driven:
    """What came of a job.

    Attributes:
        endings: specs and how they ended, in order.
        raised: what ended the command, if it was not its last run.
    """

    fates: Sequence[Fate]
    warehouse: SimulatedWarehouse
    executor: SimulatedExecutor
    planner: SimulatedPlanner
    events: list[RunEvent] = field(default_factory=list)
    endings: list[tuple[Fate, Run | AvssError]] = field(default_factory=list)
    raised: BaseException | None = None

    def ending(self, number: int) -> Run | AvssError:
        """Return how the fate of this number ended."""
        (ending,) = [ending for fate, ending in self.endings if fate is self.fates[number]]
        return ending


def drive(
    fates: Sequence[Fate],
    *,
    driver: type[Driver] = Driver,
    on_event: Callable[[Driven, RunEvent], None] = lambda driven, event: None,
    listed: int | None = None,
    watch_ends: bool = True,
    **options: Any,
) -> Driven:
    """Drive runs to their fates.

    Args:
        listed: number of runs that the job has from the start. A watch gives the others. None if all are listed.
        watch_ends: whether the watch ends after its last run.
    """
    fates = [Fate(**vars(fate)) for fate in fates]  # Each is an object of its own.
    watch: Any = None
    if listed is not None:
        watch = SimulatedWatch(fates[listed:], ends=watch_ends)
    warehouse = SimulatedWarehouse()
    driven = Driven(fates, warehouse, SimulatedExecutor(fates, **options), SimulatedPlanner(warehouse))

    def note(event: RunEvent) -> None:
        driven.events.append(event)
        on_event(driven, event)

    parts: Any = (warehouse, driven.executor, note)
    planner: Any = driven.planner
    specs: Any = fates[:listed]
    try:
        for spec, ending in driver(*parts, planner=planner, watch=watch).run(specs):
            driven.endings.append((spec, ending))  # type: ignore[arg-type]
    except BaseException as raised:
        driven.raised = raised
    return driven
