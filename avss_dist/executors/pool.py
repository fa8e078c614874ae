"""Who has which shards, what waits, what failed how often: the work of one job on its gangs.

A gang has one round at a time: a shard for each of its ranks, or one for all where they share a batch. It asks for the
next when it is done, so a slow one never holds the rest. It keeps no statistics: what dies with it is measured again.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

from avss_dist.corpus import Shard
from avss_dist.errors import AvssError, BatchTooLarge, RunFailed
from avss_dist.executors.base import Job
from avss_dist.executors.gang import Gang, Task
from avss_dist.stats import ShardResult

ATTEMPTS = 3  # of a shard, and of opening a model, before the run fails
POLL_SECONDS = 2.0


@dataclass
class _Round:
    """What a gang is doing: opening the model, or measuring shards."""

    gang: Gang
    shards: list[Shard]
    waiting_for: set[Any] = field(default_factory=set)

    @property
    def opening(self) -> bool:
        return not self.shards


class Pool:
    """The gangs of one job.

    Args:
        hire: gives a gang, new or idle.
        beats: the `gang.Beats` actor.
        placement_seconds: how long to wait for the first gang to be placed.
        hang_seconds: how long a rank may begin no layer before its gang is stopped.
        shortage: says what was asked of the cluster, and what it has.
    """

    def __init__(
        self,
        job: Job,
        shards: Sequence[Shard],
        *,
        hire: Callable[[], Gang],
        beats: Any,
        placement_seconds: float,
        hang_seconds: float,
        shortage: Callable[[], str],
    ) -> None:
        self._job = job
        self._waiting = deque(shards)
        self._left = {shard.shard_id for shard in shards}
        self._hire_gang, self._beats, self._shortage = hire, beats, shortage
        self._placement_seconds, self._hang_seconds = placement_seconds, hang_seconds
        self._rounds: dict[Any, _Round] = {}  # by the references that they wait for
        self._idle: list[Gang] = []
        self._failures: Counter[int | None] = Counter()
        self._rows = job.settings.batch_size

    def results(self, gangs: int) -> Iterator[ShardResult]:
        """Yield the result of every shard, as ranks finish them.

        Raises:
            AvssError: the model cannot be opened or observed.
            RunFailed: no gang was placed in time; a shard, or opening the model, failed `ATTEMPTS` times.
        """
        for _ in range(min(gangs, -(-len(self._waiting) // self._shards_a_round))):
            self._hire()
        first = [gang for gang in self._gangs() if gang.placed]
        deadline = time.monotonic() + self._placement_seconds
        placed, polled = False, time.monotonic()
        while self._left:
            ready, _ = ray.wait(list(self._rounds), num_returns=1, timeout=min(POLL_SECONDS, self._hang_seconds / 4))
            for reference in ready:
                placed = True
                yield from self._finish(reference)
            placed = placed or any(_is_placed(gang) for gang in first)
            if not placed and time.monotonic() > deadline:
                raise RunFailed(
                    f"No worker was placed in {self._placement_seconds:.0f} seconds. {self._shortage()}",
                    "Free some of it, ask for fewer --replicas, --ranks or --gpus-per-replica, or use another cluster.",
                )
            if time.monotonic() - polled > min(POLL_SECONDS, self._hang_seconds / 4):
                polled = time.monotonic()
                self._stop_hanging()

    def idle(self) -> list[Gang]:
        """Gangs that can take another job; those that are still at work are stopped."""
        for gang in self._gangs():
            gang.stop()
        self._rounds = {}
        return self._idle

    @property
    def _shards_a_round(self) -> int:
        return self._job.placement.ranks if self._job.placement.partition == "zero3" else 1

    def _gangs(self) -> list[Gang]:
        return list({id(round_.gang): round_.gang for round_ in self._rounds.values()}.values())

    def _hire(self) -> None:
        gang = self._hire_gang()
        self._begin(_Round(gang, []), gang.open(self._job))

    def _begin(self, round_: _Round, references: Sequence[Any]) -> None:
        round_.waiting_for = set(references)
        self._rounds |= dict.fromkeys(references, round_)

    def _give_work(self, gang: Gang) -> None:
        shards = [self._waiting.popleft() for _ in range(min(self._shards_a_round, len(self._waiting)))]
        if not shards:
            self._idle.append(gang)
            return
        forwards = max(-(-shard.num_sequences // self._rows) for shard in shards)
        of_ranks: list[Shard | None] = [*shards, *[None] * (self._shards_a_round - len(shards))]
        if self._shards_a_round == 1:
            of_ranks *= len(gang.names)
        tasks = [Task(shard=shard, rows=self._rows, forwards=forwards) for shard in of_ranks]
        self._begin(_Round(gang, shards), gang.analyze(tasks))

    def _finish(self, reference: Any) -> Iterator[ShardResult]:
        round_ = self._rounds.get(reference)
        if round_ is None:
            return  # its gang was stopped
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            if isinstance(error.cause, BatchTooLarge) and self._rows > 1:
                self._rows = (self._rows + 1) // 2
                self._replace(round_, None)
                return
            if isinstance(error.cause, AvssError):
                raise error.cause from None
            self._replace(round_, f"{type(error.cause).__name__}: {error.cause}")
            return
        except (RayActorError, OutOfMemoryError) as error:
            self._replace(round_, str(error).splitlines()[0])
            return
        del self._rounds[reference]
        round_.waiting_for.discard(reference)
        if result is not None and result.shard_id in self._left:
            self._left.discard(result.shard_id)
            yield result
        if not round_.waiting_for:
            self._give_work(round_.gang)

    def _stop_hanging(self) -> None:
        """Replace the gangs of which a rank has begun no layer for too long."""
        ready, _ = ray.wait([self._beats.ages.remote()], timeout=POLL_SECONDS)
        ages: dict[str, float] = ray.get(ready[0]) if ready else {}
        for round_ in {id(round_): round_ for round_ in self._rounds.values()}.values():
            late = [name for name in round_.gang.names if ages.get(name, 0.0) > self._hang_seconds]
            if late:
                self._replace(round_, f"rank {late[0]} made no progress in {self._hang_seconds:g} seconds")

    def _replace(self, round_: _Round, why: str | None) -> None:
        """Stop a gang and take another; its unfinished shards wait again. ``why`` None is no failure of theirs."""
        round_.gang.stop()
        for reference in round_.waiting_for:
            self._rounds.pop(reference, None)
        unfinished = [shard for shard in round_.shards if shard.shard_id in self._left]
        if why:
            failed: list[int | None] = [shard.shard_id for shard in unfinished]
            for key in failed or [None]:
                self._count_failure(key, why)
        self._waiting.extendleft(reversed(unfinished))
        if self._idle:
            self._give_work(self._idle.pop())
        else:
            self._hire()

    def _count_failure(self, key: int | None, why: str) -> None:
        """Fail the run when a shard, or opening the model (None), has failed too often."""
        self._failures[key] += 1
        if self._failures[key] >= ATTEMPTS:
            what = "Opening the model" if key is None else f"Shard {key}"
            raise RunFailed(
                f"{what} failed {ATTEMPTS} times; the last time: {why}", "Everything measured so far is kept."
            )


def _is_placed(gang: Gang) -> bool:
    return bool(ray.wait([gang.placed[0]], timeout=0)[0])
