"""Queues of units of work in a pool: pending units, unfinished units, and counts of failures.

A unit is a shard of a run, or a cell of an evaluation. Each gives one pure result, and the first one counts. Shards
travel with the calls. Patches reach workers by Ray's object store, which copies each once to a node for all of its
workers.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from bisect import insort
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Generic, TypeAlias, TypeVar

import ray
from ray import ObjectRef

from avss_dist.core.errors import AvssError, RunFailed, own_copy
from avss_dist.core.intervention import EncodedPatch
from avss_dist.core.text import count_of
from avss_dist.corpus.shards import Shard
from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.worker import Assignment, CellAssignment, ShardAssignment, UnitResult
from avss_dist.runs.work import Note, ReplicaSpec, RunShards, Underway
from avss_dist.tasks.task import Cell

MOST_SHARED = 2  # patches that are held at once: cells that need the same one are consecutive
ATTEMPTS = 3  # at a unit, and, one after the other, at opening a model, before it has failed
LATE_FACTOR = 2.0  # times the median of units of its kind, after which an idle gang may measure the same unit
LATE_SECONDS = 2.0  # and at least this
ROUND_SECONDS = 1.0  # of work that a round has where units are short: a call takes as long for one as for several
MOST_IN_ROUND = 16  # short units
MOST_NAMED = 10  # shards that a line names one by one
ROUND_FRACTION = 16  # at most this fraction of a gang's part of the pending shards, so that all gangs end together

Unit = TypeVar("Unit", bound=Shard | Cell)
Owner: TypeAlias = RunShards | Cell
"""Owner of a unit, which gets the unit's result and ends with an error of the unit: shards of a run, or a cell."""
OwnedOutcome: TypeAlias = tuple[Owner, UnitResult | Note | AvssError]
"""An owner and an outcome of it: a `runs.work.Outcome` or a `tasks.task.CellOutcome`."""


def _read_shared(patch: ObjectRef) -> bytes:
    """Return the bytes of a patch in the object store, from the copy on the worker's node."""
    return ray.get(patch)


def shape(placement: Placement) -> tuple[int, int]:
    """Return the ranks and GPUs that a gang must have to take a placement."""
    return placement.ranks, placement.gpus


def _repeated(what: str, number: int) -> str:
    if number == 0:
        return "no measurement was lost"
    if number == 1:
        return f"{what} is measured again"
    return f"{what} are measured again"


def _failed_for_good(what: str, why: str) -> RunFailed:
    return RunFailed(f"{what} failed {ATTEMPTS} times; the last time: {why}", "Everything measured so far is kept.")


class UnitQueue(ABC, Generic[Unit]):
    """Units that are measured with one model. A unit's id is its index.

    Args:
        owners: run or cell that each unit belongs to.

    Attributes:
        spec: replica that a gang opens for the units.
        units_a_round: number of units in a round: one for each rank, where ranks take different ones.
        is_batched: whether a round may have several short units.
        pending: units that no gang has, in order.
        unfinished: units without a result.
        rows: rows in a batch; halved when a batch did not fit in memory.
        clock: returns the monotonic time in seconds; that of the pool.
    """

    def __init__(self, spec: ReplicaSpec, units: Sequence[Unit], owners: Sequence[Owner]) -> None:
        self.spec = spec
        self.shape = shape(spec.placement)
        self.units: Sequence[Unit] = units
        self.units_a_round = 1
        self.is_batched = False
        self._owners = owners
        self.pending: deque[int] = deque(range(len(units)))
        self.unfinished: set[int] = set(self.pending)
        self.rows = spec.settings.batch_size
        self.clock: Callable[[], float] = time.monotonic
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)  # of a unit in finished rounds, by kind
        self._again: set[int] = set()  # units that became pending again: only these can be finished while pending
        self._repeated: set[int] = set()  # of these, the ones that were late
        self._failures: Counter[int] = Counter()  # by unit
        self._failures_to_open = 0
        self._failed_to_open = -math.inf  # monotonic time of the last failure to open the model

    @abstractmethod
    def describe(self, unit: int) -> str:
        """Return the name of a unit for people."""

    @abstractmethod
    def describe_repeated(self, units: Sequence[int]) -> str:
        """Return a clause that says which units are measured again: ``shards 3, 4 are measured again``."""

    def note(self, text: str) -> list[OwnedOutcome]:
        """Return the outcomes by which readers of the results learn of something."""
        return []

    def kind(self, unit: int) -> str:
        """Return the kind of a unit. Units of one kind take about the same time."""
        return ""

    @abstractmethod
    def parts(self, units: Sequence[int]) -> Sequence[Sequence[Assignment]]:
        """Return each rank's assignments in a round of these units."""

    def fail(self, units: Sequence[int], error: AvssError) -> list[OwnedOutcome]:
        """End the run or the cells of these units with an error, and return it as the outcome of each.

        Without units, the model cannot be opened.
        """
        failed = self.unfinished.intersection(units or self.unfinished)
        owners = dict.fromkeys(self._owners[unit] for unit in sorted(failed))
        self._remove([unit for unit in self.unfinished if self._owners[unit] in owners])
        return [(owner, own_copy(error)) for owner in owners]

    @property
    def is_active(self) -> bool:
        """Whether a result of it is still of use."""
        return bool(self.unfinished)

    def discard_dropped(self) -> None:
        """Remove the units whose results are of no use any more."""

    @property
    def pending_rounds(self) -> int:
        """Number of rounds that no gang has begun."""
        return math.ceil(len(self.pending) / self.units_a_round)

    def next_units(self, gangs: int = 1) -> list[int]:
        """Take the units of one round.

        Args:
            gangs: number of gangs that share the pending units.
        """
        number = min(self._round_limit(gangs), len(self.pending))
        return [self.pending.popleft() for _ in range(number)]

    def _round_limit(self, gangs: int) -> int:
        """Return the maximum number of units in the next round. Repeated units are measured alone."""
        if not self.is_batched or not self.pending or self.pending[0] in self._again:
            return self.units_a_round
        in_time = ROUND_SECONDS / max(self.usual_seconds(self.pending[0]), 1e-9)
        fair_part = len(self.pending) / (ROUND_FRACTION * gangs)
        return max(1, int(min(in_time, fair_part, MOST_IN_ROUND)))

    def runs_ahead(self, gangs: int) -> bool:
        """Whether a measuring gang may have its next round in advance, with this number of gangs to keep busy.

        Repeated units are measured alone, which shows the one that failed.
        """
        return self.is_batched and len(self.pending) > gangs and not self._again & self.unfinished

    def by_rank(self, units: Sequence[int]) -> list[Sequence[int]]:
        """Return each rank's units in a round: a different one or none for each rank, or the same for all ranks."""
        ranks = self.spec.placement.ranks
        if self.units_a_round == 1:
            return [units] * ranks
        return [units[rank : rank + 1] for rank in range(ranks)]

    def finish(self, unit: int, result: UnitResult | None) -> list[OwnedOutcome]:
        """Return the outcome of a unit's first result. Later results, and None, give an empty list."""
        if result is None or unit not in self.unfinished:
            return []
        if unit in self._again:
            self._remove([unit])
        self.unfinished.discard(unit)
        return [(self._owners[unit], result)]

    def note_opened(self) -> None:
        """Forget the failures to open the model: a gang has opened it."""
        self._failures_to_open = 0

    def note_duration(self, units: Sequence[int], seconds: float) -> None:
        """Remember how long a round of these units took."""
        insort(self._seconds[self.kind(units[0])], seconds / len(units))

    def note_progress(self, units: Sequence[int], what: str, share: float) -> None:
        """Receive the current activity in a round of these units, and the share of it that is done."""

    def usual_seconds(self, unit: int) -> float:
        """Return the median seconds of units of this kind, or infinity if none is done."""
        seconds = self._seconds.get(self.kind(unit), [])
        if not seconds:
            return math.inf
        return seconds[len(seconds) // 2]

    def repeat_late(self, units: Sequence[int], seconds: float) -> bool:
        """Let an idle gang measure the units of a round that takes much longer than others, too, but only once.

        Args:
            seconds: since the round was begun.

        Returns:
            Whether they are pending again.
        """
        if self.units_a_round > 1 or not units:
            return False
        if units[0] in self._repeated or units[0] not in self.unfinished:
            return False
        usual_seconds = len(units) * self.usual_seconds(units[0])
        if seconds <= max(LATE_SECONDS, LATE_FACTOR * usual_seconds):
            return False
        self._repeated.update(units)
        self._again.update(units)
        self.pending.extendleft(reversed(units))
        return True

    def put_back(self, units: Sequence[int], why: str | None, begun: float = math.inf) -> list[OwnedOutcome]:
        """Make the units that a gang did not finish pending again. Without units, the gang did not open the model.

        Args:
            why: reason that counts as a failure, of which there may be `ATTEMPTS`; None does not count.
            begun: monotonic time when the units were taken. Many gangs open a model at once and are lost together:
                those that began before a counted failure count as the same failure.

        Returns:
            Outcomes of the units that have failed for good.
        """
        unfinished = [unit for unit in units if unit in self.unfinished]
        missing = [unit for unit in unfinished if unit not in self.pending]
        self.pending.extendleft(reversed(missing))
        self._again.update(unfinished)
        if why is None:
            return []
        if not units:
            return self._count_failure_to_open(why, begun)
        if len(units) > self.units_a_round:
            return []  # The failing one shows when they are measured one by one.
        outcomes: list[OwnedOutcome] = []
        for unit in unfinished:
            self._failures[unit] += 1
            if self._failures[unit] >= ATTEMPTS:
                outcomes += self.fail([unit], _failed_for_good(self.describe(unit), why))
        return outcomes

    def _count_failure_to_open(self, why: str, begun: float) -> list[OwnedOutcome]:
        """Count a failure to open the model, unless it is the same as the last one. See `put_back`."""
        if begun < self._failed_to_open:
            return []
        self._failed_to_open = self.clock()
        self._failures_to_open += 1
        if self._failures_to_open < ATTEMPTS:
            return []
        return self.fail([], _failed_for_good("Opening the model", why))

    def _remove(self, units: Sequence[int]) -> None:
        self.unfinished.difference_update(units)
        self.pending = deque(unit for unit in self.pending if unit in self.unfinished)


class ShardQueue(UnitQueue[Shard]):
    """The shards of one run. An error of one shard ends the run."""

    def __init__(self, run_shards: RunShards) -> None:
        super().__init__(run_shards.replica_spec, run_shards.shards, [run_shards] * len(run_shards.shards))
        placement = self.spec.placement
        self.units_a_round = placement.ranks if PARTITIONS[placement.partition].splits_data else 1
        self.is_batched = placement.ranks == 1
        self._run_shards = run_shards

    @property
    def is_active(self) -> bool:
        """Whether a result of it is still of use."""
        return super().is_active and not self._run_shards.dropped

    def discard_dropped(self) -> None:
        """Remove the units of a run that was dropped."""
        if self._run_shards.dropped:
            self._remove([*self.unfinished])

    def describe(self, unit: int) -> str:
        """Return ``Shard 3``."""
        return f"Shard {self.units[unit].shard_id}"

    def describe_repeated(self, units: Sequence[int]) -> str:
        """Return a clause that says which shards are measured again."""
        ids = [str(self.units[unit].shard_id) for unit in units]
        if len(ids) > MOST_NAMED:
            names = f"{len(ids)} shards"
        elif len(ids) > 1:
            names = f"shards {', '.join(ids)}"
        else:
            names = f"shard {', '.join(ids)}"
        return _repeated(names, len(ids))

    def note(self, text: str) -> list[OwnedOutcome]:
        """Return a note for the run's row."""
        return [(self._run_shards, Note(text))]

    def parts(self, units: Sequence[int]) -> list[Sequence[Assignment]]:
        """Return the shards of each rank in a round, or the same shard for all ranks. Ranks without one run along."""
        forwards = 0  # as many as a shard takes
        if self.spec.placement.ranks > 1:
            forwards = max(math.ceil(self.units[unit].num_sequences / self.rows) for unit in units)
        by_rank: list[Sequence[Assignment]] = []
        for part in self.by_rank(units):
            assignments = [self._assignment(self.units[unit], forwards) for unit in part]
            by_rank.append(assignments or [self._assignment(None, forwards)])
        return by_rank

    def _assignment(self, shard: Shard | None, forwards: int) -> ShardAssignment:
        return ShardAssignment(
            shard=shard,
            rows=self.rows,
            forwards=forwards,
            run_id=self._run_shards.run_id,
            warehouse=self._run_shards.warehouse,
        )


class CellQueue(UnitQueue[Cell]):
    """The cells of one model. An error ends its cell alone, unless the model cannot be opened."""

    def __init__(self, spec: ReplicaSpec, units: Sequence[Cell], underway: Underway | None = None) -> None:
        super().__init__(spec, units, units)
        self._underway = underway
        self._shared: dict[str, ObjectRef] = {}  # references to the last patches in the object store, by key

    def describe(self, unit: int) -> str:
        """Return ``Part 3 of TASK``."""
        return f"Part {self.units[unit].part} of {self.units[unit].task}"

    def describe_repeated(self, units: Sequence[int]) -> str:
        """Return a clause that says how many evaluations are measured again."""
        return _repeated(count_of(len(units), "evaluation"), len(units))

    def kind(self, unit: int) -> str:
        """Return the name of a cell's task, whose parts are of one size, but for the last."""
        return self.units[unit].task

    def note_progress(self, units: Sequence[int], what: str, share: float) -> None:
        """Report the current activity in these cells, and the share of it that is done."""
        if self._underway is None:
            return
        for unit in units:
            self._underway(self.units[unit], what, share)

    def parts(self, units: Sequence[int]) -> list[Sequence[Assignment]]:
        """Return the same cell for every rank, with its patch where workers reach it."""
        (unit,) = units
        cell = self.units[unit]
        patch = cell.intervention.patch
        if patch:
            if patch.key not in self._shared:
                self._shared[patch.key] = ray.put(patch.read())
                for old in [*self._shared][:-MOST_SHARED]:
                    del self._shared[old]
            shared = EncodedPatch(patch.key, partial(_read_shared, self._shared[patch.key]))
            cell = replace(cell, intervention=replace(cell.intervention, patch=shared))
        return [[CellAssignment(cell=cell, rows=self.rows)]] * self.spec.placement.ranks


AnyQueue: TypeAlias = ShardQueue | CellQueue
