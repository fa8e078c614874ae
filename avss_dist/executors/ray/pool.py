"""Who has which shards, what waits, what failed how often: the works of one session on its gangs.

A gang has one round at a time: a shard for each of its ranks, or one for all where they share a batch. It asks for the
next when it is done, so a slow one never holds the rest; where its work has none left, it opens the model of the next.
The pool keeps no statistics: what dies with a gang is measured again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from avss_dist.corpus.shards import Shard
from avss_dist.errors import AvssError, BatchTooLarge, RunFailed
from avss_dist.executors.base import Outcome, RunShards
from avss_dist.executors.prefetch import Prefetcher
from avss_dist.executors.ray.gang import Gang, Task, missing_package
from avss_dist.executors.ray.metrics import Metrics
from avss_dist.executors.ray.queue import Effort
from avss_dist.partition.base import Placement

POLL_SECONDS = 2.0
SOON_SECONDS = 0.02  # to look again, while a gang is idle and the next work is being planned


@dataclass(eq=False)
class _Round:
    """What a gang is doing: opening a model (no shards), or measuring."""

    gang: Gang
    effort: Effort
    shards: list[Shard]
    rows: int
    begun: float = field(default_factory=time.monotonic)
    waiting_for: set[Any] = field(default_factory=set)


class Pool:
    """The gangs of one executor, and the works that they are on.

    Args:
        hire: gives a new gang for a placement.
        replicas: how many gangs of a placement work at once.
        beats: the `beats.HeartbeatMonitor` actor.
        placement_seconds: how long to wait for a gang to be placed, while none works.
        hang_seconds: how long a rank may begin no layer before its gang is stopped.
        shortage: says what a placement asks of the cluster, and what it has.
    """

    def __init__(
        self,
        works: Prefetcher[RunShards],
        *,
        hire: Callable[[Placement], Gang],
        replicas: Callable[[Placement], int],
        beats: Any,
        placement_seconds: float,
        hang_seconds: float,
        shortage: Callable[[Placement], str],
    ) -> None:
        self._works = works
        self._hire_gang, self._replicas, self._shortage = hire, replicas, shortage
        self._beats = beats
        self._placement_seconds, self._hang_seconds = placement_seconds, hang_seconds
        self._efforts: list[Effort] = []  # in the order in which their works came
        self._rounds: dict[Any, _Round] = {}  # by the references that they wait for
        self._idle: list[Gang] = []
        self._outcomes: list[Outcome] = []
        self._metrics = Metrics()
        self._moved = self._polled = time.monotonic()

    def outcomes(self) -> Iterator[Outcome]:
        """Yield the result of every shard as ranks finish them, and the error of every work that cannot go on.

        A work's error is an AvssError of its model, or RunFailed: no gang was placed in time; a shard, or opening the
        model, failed too often.
        """
        while self._take_works():
            self._employ()
            yield from self._arrived()  # now that no gang waits for who takes them
            self._wait()
        yield from self._arrived()

    def close(self) -> None:
        """Stop every gang."""
        for gang in self._gangs():
            gang.stop()
        self._rounds, self._idle = {}, []

    def _arrived(self) -> list[Outcome]:
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _gangs(self) -> list[Gang]:
        return [*self._idle, *{id(r.gang): r.gang for r in self._rounds.values()}.values()]

    def _take_works(self) -> bool:
        """Take the next work as soon as no shard waits; False when all is done."""
        self._efforts = [effort for effort in self._efforts if effort.open]
        while not any(effort.waiting for effort in self._efforts):
            work = self._works.next(wait=not self._efforts)
            if work is None:
                break
            self._efforts.append(Effort(work))
            self._moved = time.monotonic()
        return bool(self._efforts)

    def _employ(self) -> None:
        """Give idle gangs work, and hire others where shards wait that no gang is there for."""
        for gang in list(self._idle):
            effort = next((e for e in self._efforts if e.waiting and e.shape == gang.shape), None)
            if effort is None:
                self._help(gang)
            else:
                self._idle.remove(gang)
                self._give(gang, effort)
        for effort in self._efforts:
            coming = sum(r.effort is effort and not r.shards for r in set(self._rounds.values()))
            there = sum(gang.shape == effort.shape for gang in self._gangs())
            for _ in range(min(effort.rounds_waiting - coming, self._replicas(effort.placement) - there)):
                gang = self._hire_gang(effort.placement)
                self._begin(_Round(gang, effort, [], effort.rows), gang.open(effort.work.replica_spec))
        if self._idle:
            self._make_room()

    def _make_room(self) -> None:
        """Stop idle gangs where one of another shape waits for what they hold."""
        opening = {r.gang for r in self._rounds.values() if not r.shards}
        wanted = {gang.shape for gang in opening if not _is_placed(gang)}
        for gang in [gang for gang in self._idle if wanted - {gang.shape}]:
            self._idle.remove(gang)
            gang.stop()

    def _help(self, gang: Gang) -> None:
        """Let an idle gang measure the slowest shard too; whichever result comes first counts."""
        now = time.monotonic()
        late = [
            r
            for r in set(self._rounds.values())
            if r.effort.shape == gang.shape and r.effort.is_late(r.shards, now - r.begun)
        ]
        if not late:
            return
        slowest = min(late, key=lambda r: r.begun)
        slowest.effort.helped.add(slowest.shards[0].shard_id)
        slowest.effort.waiting.append(slowest.shards[0])
        self._idle.remove(gang)
        self._give(gang, slowest.effort)

    def _give(self, gang: Gang, effort: Effort) -> None:
        """Begin a round: open the effort's model, or measure the next of its shards."""
        if gang.replica_spec != effort.work.replica_spec:
            self._begin(_Round(gang, effort, [], effort.rows), gang.open(effort.work.replica_spec))
            return
        shards = effort.next_shards()
        forwards = max(-(-shard.num_sequences // effort.rows) for shard in shards)
        of_ranks: list[Shard | None] = [*shards, *[None] * (effort.shards_a_round - len(shards))]
        if effort.shards_a_round == 1:
            of_ranks *= len(gang.names)
        run_id = effort.work.run_id
        tasks = [Task(shard=shard, rows=effort.rows, forwards=forwards, run_id=run_id) for shard in of_ranks]
        self._begin(_Round(gang, effort, shards, effort.rows), gang.analyze(tasks))

    def _begin(self, round_: _Round, references: list[Any]) -> None:
        round_.waiting_for = set(references)
        self._rounds |= dict.fromkeys(references, round_)

    def _wait(self) -> None:
        """Take what has come, or look after what does not come."""
        poll = min(POLL_SECONDS, self._hang_seconds / 4)
        soon = SOON_SECONDS if self._idle and not self._works.exhausted else poll
        references = list(self._rounds)
        if not references:
            return
        if not ray.wait(references, num_returns=1, timeout=soon)[0]:
            self._require_placement()
        for reference in ray.wait(references, num_returns=len(references), timeout=0)[0]:
            self._moved = time.monotonic()
            self._finish(reference)
        if time.monotonic() - self._polled > poll:
            self._polled = time.monotonic()
            self._stop_hanging()

    def _finish(self, reference: Any) -> None:
        round_ = self._rounds.get(reference)
        if round_ is None:
            return  # its gang was stopped
        effort = round_.effort
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            self._fail(round_, reference, error.cause)
            return
        except RayError as error:  # the worker, its node or the result was lost
            if missing := missing_package(error):
                self._end(effort, missing)
            self._replace(round_, str(error).splitlines()[0])
            return
        del self._rounds[reference]
        round_.waiting_for.discard(reference)
        if result is not None and effort.counts(result.shard_id):
            self._outcomes.append((effort.work, result))
            self._metrics.measured(result.num_tokens, is_last=not effort.left)
        if not round_.waiting_for:
            if round_.shards:
                effort.seconds.append(time.monotonic() - round_.begun)
            else:
                round_.gang.replica_spec = effort.work.replica_spec
            self._free(round_.gang, effort)

    def _free(self, gang: Gang, effort: Effort) -> None:
        """A gang has finished a round: its next one at once, or it is idle."""
        if effort.open and effort.waiting:
            self._give(gang, effort)
        else:
            self._idle.append(gang)

    def _fail(self, round_: _Round, reference: Any, error: Exception) -> None:
        """A rank raised."""
        if isinstance(error, BatchTooLarge) and round_.rows > 1:
            round_.effort.rows = min(round_.effort.rows, (round_.rows + 1) // 2)
            self._replace(round_, None)
        elif not isinstance(error, AvssError):
            self._replace(round_, f"{type(error).__name__}: {error}")
        else:
            self._end(round_.effort, error)
            if len(round_.gang.names) > 1:  # the other ranks may wait for this one
                self._replace(round_, None)
                return
            del self._rounds[reference]
            round_.gang.replica_spec = None
            self._idle.append(round_.gang)

    def _end(self, effort: Effort, error: AvssError) -> None:
        """A work cannot go on; what its gangs still do is of no use."""
        if effort.open:
            effort.drop()
            self._metrics.failed()
            self._outcomes.append((effort.work, error))

    def _require_placement(self) -> None:
        """End a work for whose gangs the cluster has had no room for too long."""
        if any(_is_placed(gang) for gang in self._gangs()):
            return
        if time.monotonic() - self._moved <= self._placement_seconds:
            return
        effort = self._efforts[0]
        why = f"No worker was placed in {self._placement_seconds:.0f} seconds. {self._shortage(effort.placement)}"
        hint = "Free some of it, ask for fewer --replicas, --ranks or --gpus-per-replica, or use another cluster."
        self._end(effort, RunFailed(why, hint))
        for round_ in {r for r in self._rounds.values() if r.effort is effort}:
            self._stop(round_)
        self._moved = time.monotonic()

    def _stop_hanging(self) -> None:
        """Replace the gangs of which a rank has begun no layer for too long."""
        ages: dict[str, float] = {}
        try:
            ready, _ = ray.wait([self._beats.ages.remote()], timeout=POLL_SECONDS)
            ages = ray.get(ready[0]) if ready else {}
        except RayError:  # lost with its node; Ray starts it elsewhere
            return
        for round_ in set(self._rounds.values()):
            late = [name for name in round_.gang.names if ages.get(name, 0.0) > self._hang_seconds]
            if late:
                self._replace(round_, f"rank {late[0]} made no progress in {self._hang_seconds:g} seconds")

    def _replace(self, round_: _Round, why: str | None) -> None:
        """Stop a gang; its unfinished shards wait again, for another. ``why`` None is no failure of theirs."""
        self._stop(round_)
        try:
            round_.effort.take_back(round_.shards, why)
        except RunFailed as error:
            self._end(round_.effort, error)

    def _stop(self, round_: _Round) -> None:
        round_.gang.stop()
        for reference in round_.waiting_for:
            self._rounds.pop(reference, None)


def _is_placed(gang: Gang) -> bool:
    return bool(ray.wait([gang.placed[0]], timeout=0)[0])
