"""Units of work on their way through a pool: which are pending, which are unfinished, what failed how often.

A unit is a shard of a run, or a cell of an evaluation. Each gives one pure result, and the first one counts.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from bisect import insort
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Generic, TypeVar

from avss_dist.corpus.shards import Shard
from avss_dist.errors import AvssError, RunFailed
from avss_dist.executors.base import ReplicaSpec, RunShards, Underway
from avss_dist.executors.ray.object_store import BLOCK_SHARDS, PatchSharer, ShardSharer
from avss_dist.executors.ray.worker import Assignment, CellAssignment, ShardAssignment
from avss_dist.partition.base import Placement
from avss_dist.registry import PARTITIONS
from avss_dist.tasks.cells import Cell
from avss_dist.text import count_of

ATTEMPTS = 3  # at a unit, and, one after the other, at opening a model, before it has failed
LATE_FACTOR = 2.0  # times the median of units of its kind, after which an idle gang may measure the same unit
LATE_SECONDS = 2.0  # and at least this
ROUND_SECONDS = 1.0  # of work that a round has where units are short: a call takes as long for one as for several
MOST_NAMED = 10  # shards that a line names one by one
ROUND_FRACTION = 16  # and at most this fraction of a gang's part of what is pending, so that all end together

Unit = TypeVar("Unit", bound=Shard | Cell)


def shape(placement: Placement) -> tuple[int, int]:
    """What a gang must have to take a placement: ranks and GPUs."""
    return placement.ranks, placement.gpus


def _repeated(what: str, number: int) -> str:
    return f"{what} {'is' if number == 1 else 'are'} measured again" if number else "no measurement was lost"


class UnitQueue(ABC, Generic[Unit]):
    """Units that are measured with one model; a unit's id is its index.

    Attributes:
        spec: what a gang opens for them.
        pending: units that no gang has; in order.
        unfinished: units of which no result has come.
        rows: rows of a batch; fewer once that many did not fit in memory.
    """

    def __init__(self, spec: ReplicaSpec, units: Sequence[Unit]) -> None:
        self.spec = spec
        self.shape = shape(spec.placement)
        self.units: Sequence[Unit] = units
        self.pending: deque[int] = deque(range(len(units)))
        self.unfinished: set[int] = set(self.pending)
        self.rows = spec.settings.batch_size
        self._seconds: dict[str, list[float]] = {}  # of rounds that are done, ascending, by kind of unit
        self._speculated: set[int] = set()
        self._again: set[int] = set()  # units that became pending again: only these can be finished as they are
        self._failures: Counter[int | None] = Counter()
        self._failed_to_open = -math.inf  # when one of them was one to open the model

    @abstractmethod
    def describe(self, unit: int) -> str:
        """What people call a unit."""

    @abstractmethod
    def describe_repeated(self, units: Sequence[int]) -> str:
        """Return a clause that says which units are measured again: ``shards 3, 4 are measured again``."""

    def note(self, text: str) -> None:
        """Note something that readers of the results should know."""

    @abstractmethod
    def kind(self, unit: int) -> str:
        """Units of one kind take about the same time."""

    @abstractmethod
    def parts(self, units: Sequence[int]) -> Sequence[tuple[Sequence[Assignment], Sequence[Any]]]:
        """Return each rank's assignments in a round of these units, and the blocks that hold their shards."""

    @abstractmethod
    def _outcome(self, unit: int, result: Any) -> tuple[Any, Any]:
        """A result, beside what it is the result of."""

    @abstractmethod
    def fail(self, units: Sequence[int], error: AvssError) -> list[tuple[Any, AvssError]]:
        """End what an error of these units ends; none is a model that cannot be opened. Returns the outcomes."""

    @property
    def is_active(self) -> bool:
        """Whether a result of it is still of use."""
        return bool(self.unfinished)

    @property
    def units_a_round(self) -> int:
        """One for each rank, where ranks take different ones."""
        placement = self.spec.placement
        return placement.ranks if PARTITIONS[placement.partition].splits_data else 1

    @property
    def pending_rounds(self) -> int:
        """Rounds that no gang has begun."""
        return -(-len(self.pending) // self.units_a_round)

    def next_units(self, gangs: int = 1) -> list[int]:
        """The units of one round.

        Args:
            gangs: that share what is pending.
        """
        most = min(self._most_in_a_round(gangs), len(self.pending))
        units = [self.pending.popleft() for _ in range(min(most, self.units_a_round))]
        while len(units) < most and units[0] not in self._again:  # which are the first of those that are pending
            units.append(self.pending.popleft())
        return units

    def _most_in_a_round(self, gangs: int) -> int:
        """How many units a round may have."""
        return self.units_a_round

    def runs_ahead(self, gangs: int) -> bool:
        """Whether a gang that measures may have its next round beforehand; others of so many go without none."""
        return False

    def by_rank(self, units: Sequence[int]) -> list[Sequence[int]]:
        """The units of each rank in a round: one of its own or none, or the same for all."""
        ranks = self.spec.placement.ranks
        if self.units_a_round == 1:
            return [units] * ranks
        return [units[rank : rank + 1] for rank in range(ranks)]

    def finish(self, unit: int, result: Any) -> list[tuple[Any, Any]]:
        """The outcome of a unit's first result; of a later one, and of a rank that reports none (None), none."""
        if result is None or unit not in self.unfinished:
            return []
        if unit in self._again:
            self._remove([unit])
        self.unfinished.discard(unit)
        return [self._outcome(unit, result)]

    def note_opened(self) -> None:
        """A gang has opened the model, so it can be opened: earlier failures count no more."""
        del self._failures[None]

    def note_duration(self, units: Sequence[int], seconds: float) -> None:
        """Remember how long a round of these units took."""
        if self.units_a_round == 1:
            seconds /= len(units)
        insort(self._seconds.setdefault(self.kind(units[0]), []), seconds)

    def note_progress(self, units: Sequence[int], what: str, share: float) -> None:
        """What is being done in a round of these units, and which share of that is done."""

    def usual_seconds(self, unit: int) -> float:
        """How long units of this kind took, as their median; infinite where none is done."""
        seconds = self._seconds.get(self.kind(unit)) or [math.inf]
        return seconds[len(seconds) // 2]

    def is_late(self, units: Sequence[int], seconds: float) -> bool:
        """Whether a round takes so much longer than others that its units may be measured twice."""
        if self.units_a_round > 1 or not units:
            return False
        late = seconds > max(LATE_SECONDS, LATE_FACTOR * len(units) * self.usual_seconds(units[0]))
        return late and units[0] in self.unfinished and units[0] not in self._speculated

    def speculate(self, units: Sequence[int]) -> None:
        """Let units be taken a second time, while their first gang goes on."""
        self._speculated.update(units)
        self._again.update(units)
        self.pending.extendleft(reversed(units))

    def put_back(self, units: Sequence[int], why: str | None, begun: float = math.inf) -> list[tuple[Any, AvssError]]:
        """Let units be taken again that a gang did not finish; none is a model that it did not open.

        Args:
            why: the failure, of which there may be `ATTEMPTS`; None is no failure of theirs.
            begun: when they were taken, by the monotonic clock. Many gangs open a model at once, and are lost at once
                with their nodes: those that began before a failure fail with it.

        Returns:
            The outcomes of what has failed for good.
        """
        unfinished = [unit for unit in units if unit in self.unfinished]
        self.pending.extendleft(reversed([unit for unit in unfinished if unit not in self.pending]))
        self._again.update(unfinished)
        if why is None or (not units and begun < self._failed_to_open):
            return []
        if len(units) > self.units_a_round:
            return []  # which of them it was shows when each is measured alone
        failed: list[int | None] = [*unfinished] if units else [None]
        return [outcome for unit in failed for outcome in self._count_failure(unit, why)]

    def _count_failure(self, unit: int | None, why: str) -> list[tuple[Any, AvssError]]:
        """The outcomes of one more failure of a unit, or of opening the model (None)."""
        if unit is None:
            self._failed_to_open = time.monotonic()
        self._failures[unit] += 1
        if self._failures[unit] < ATTEMPTS:
            return []
        what = "Opening the model" if unit is None else self.describe(unit)
        error = RunFailed(
            f"{what} failed {ATTEMPTS} times; the last time: {why}", "Everything measured so far is kept."
        )
        return self.fail([] if unit is None else [unit], error)

    def _remove(self, units: Sequence[int]) -> None:
        self.unfinished.difference_update(units)
        self.pending = deque(unit for unit in self.pending if unit in self.unfinished)


class ShardQueue(UnitQueue[Shard]):
    """The shards of one run; an error of one of them ends the run."""

    def __init__(self, run: RunShards) -> None:
        super().__init__(run.replica_spec, run.shards)
        self._run = run
        self._shards = ShardSharer(run.shards)

    @property
    def is_active(self) -> bool:
        """Whether a result of it is still of use."""
        if self._run.dropped:
            self._remove([*self.unfinished])
        return super().is_active

    def describe(self, unit: int) -> str:
        """``Shard 3``."""
        return f"Shard {self.units[unit].shard_id}"

    def describe_repeated(self, units: Sequence[int]) -> str:
        """See `UnitQueue`."""
        ids = [str(self.units[unit].shard_id) for unit in units]
        few = f"shard{'s' * (len(ids) > 1)} {', '.join(ids)}" if len(ids) <= MOST_NAMED else f"{len(ids)} shards"
        return _repeated(few, len(ids))

    def note(self, text: str) -> None:
        """See `UnitQueue`: the run's row has it among its notes."""
        self._run.notes.append(text)

    def kind(self, unit: int) -> str:
        """Shards of a run are of one size, but for the last."""
        return "shard"

    def _most_in_a_round(self, gangs: int) -> int:
        """Several short shards for a gang of one rank: the driver hears of them in one answer."""
        if self.spec.placement.ranks > 1 or not self.pending:
            return super()._most_in_a_round(gangs)
        in_time = ROUND_SECONDS / max(self.usual_seconds(self.pending[0]), 1e-9)
        return max(1, int(min(in_time, len(self.pending) / (ROUND_FRACTION * gangs), BLOCK_SHARDS)))

    def runs_ahead(self, gangs: int) -> bool:
        """See `UnitQueue`. What is measured again is measured alone: it shows whether it was what failed."""
        return self.spec.placement.ranks == 1 and len(self.pending) > gangs and not self._again & self.unfinished

    def parts(self, units: Sequence[int]) -> list[tuple[Sequence[Assignment], Sequence[Any]]]:
        """See `UnitQueue`: shards for each rank, or the same one for all; ranks without a shard run along."""
        forwards = 0  # as many as a shard takes
        if self.spec.placement.ranks > 1:
            forwards = max(-(-self.units[unit].num_sequences // self.rows) for unit in units)
        assign = partial(
            ShardAssignment,
            rows=self.rows,
            forwards=forwards,
            run_id=self._run.run_id,
            warehouse=self._run.warehouse,
        )
        shared = [self._shards.share(indices) for indices in self.by_rank(units)]
        return [([assign(place=place) for place in places or (None,)], blocks) for places, blocks in shared]

    def _outcome(self, unit: int, result: Any) -> tuple[RunShards, Any]:
        return self._run, result

    def fail(self, units: Sequence[int], error: AvssError) -> list[tuple[RunShards, AvssError]]:
        """The run ends with its first error."""
        if not self.is_active:
            return []
        self._remove([*self.unfinished])
        return [(self._run, error)]


class CellQueue(UnitQueue[Cell]):
    """The cells of one model; an error ends its cell alone, unless the model cannot be opened."""

    def __init__(self, spec: ReplicaSpec, units: Sequence[Cell], underway: Underway | None = None) -> None:
        super().__init__(spec, units)
        self._underway = underway
        self._patches = PatchSharer()

    @property
    def units_a_round(self) -> int:
        """All ranks take the same cell, and share what is in it."""
        return 1

    def describe(self, unit: int) -> str:
        """The task, and which part of it."""
        return f"Part {self.units[unit].part} of {self.units[unit].task}"

    def describe_repeated(self, units: Sequence[int]) -> str:
        """See `UnitQueue`."""
        return _repeated(count_of(len(units), "evaluation"), len(units))

    def kind(self, unit: int) -> str:
        """Parts of a task are of one size, but for the last."""
        return self.units[unit].task

    def note_progress(self, units: Sequence[int], what: str, share: float) -> None:
        """See `UnitQueue`."""
        if self._underway is not None:
            for unit in units:
                self._underway(self.units[unit], what, share)

    def parts(self, units: Sequence[int]) -> list[tuple[Sequence[Assignment], Sequence[Any]]]:
        """See `UnitQueue`: the same cell for every rank, with its patch where workers reach it."""
        (unit,) = units
        assignment = CellAssignment(cell=self._sent(self.units[unit]), rows=self.rows)
        return [([assignment], ())] * self.spec.placement.ranks

    def _sent(self, cell: Cell) -> Cell:
        """Return a cell whose patch, if it has one, is where workers reach it."""
        patch = cell.intervention.patch
        if patch is None:
            return cell
        return replace(cell, intervention=replace(cell.intervention, patch=self._patches.share(patch)))

    def _outcome(self, unit: int, result: Any) -> tuple[Cell, Any]:
        return self.units[unit], result

    def fail(self, units: Sequence[int], error: AvssError) -> list[tuple[Cell, AvssError]]:
        """Each of these cells, or all, have the error."""
        failed = sorted(self.unfinished.intersection(units or self.unfinished))
        self._remove(failed)
        return [(self.units[unit], error) for unit in failed]
