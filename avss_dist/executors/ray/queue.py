"""One work on its way through a pool: which of its shards wait, which are left, what failed how often."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from statistics import median

from avss_dist.corpus.shards import Shard
from avss_dist.errors import RunFailed
from avss_dist.executors.base import RunShards
from avss_dist.partition.base import Placement

ATTEMPTS = 3  # of a shard, and of opening a model, before the run fails
LATE_FACTOR = 2.0  # times the median round, after which an idle gang may measure the same shard
LATE_SECONDS = 2.0  # and at least this


def shape(placement: Placement) -> tuple[int, int]:
    """What a gang must have to take a placement: ranks and GPUs."""
    return placement.ranks, placement.gpus


class Effort:
    """See above. Shards leave ``waiting`` when a gang takes them, and ``left`` when their first result has come."""

    def __init__(self, work: RunShards) -> None:
        self.work = work
        self.placement = work.replica_spec.placement
        self.shape = shape(self.placement)
        self.waiting = deque(work.shards)
        self.left = {shard.shard_id for shard in work.shards}
        self.rows = work.replica_spec.settings.batch_size
        self.seconds: list[float] = []  # of rounds that are done
        self.helped: set[int] = set()  # shards that two gangs were given
        self._failures: Counter[int | None] = Counter()

    @property
    def open(self) -> bool:
        """Whether a result of it is still of use."""
        if self.work.dropped:
            self.drop()
        return bool(self.left)

    @property
    def shards_a_round(self) -> int:
        """One for each rank, where ranks take different ones."""
        return self.placement.ranks if self.placement.partition == "zero3" else 1

    @property
    def rounds_waiting(self) -> int:
        """Rounds that no gang has begun."""
        return -(-len(self.waiting) // self.shards_a_round)

    def next_shards(self) -> list[Shard]:
        """The shards of one round."""
        return [self.waiting.popleft() for _ in range(min(self.shards_a_round, len(self.waiting)))]

    def counts(self, shard_id: int) -> bool:
        """Whether a result is the first of its shard; each counts once."""
        if shard_id not in self.left:
            return False
        self.left.discard(shard_id)
        self.waiting = deque(shard for shard in self.waiting if shard.shard_id != shard_id)
        return True

    def is_late(self, shards: Sequence[Shard], seconds: float) -> bool:
        """Whether a round takes so much longer than others that its shard may be measured twice."""
        if self.shards_a_round > 1 or not self.seconds or not shards:
            return False
        shard_id = shards[0].shard_id
        late = seconds > max(LATE_SECONDS, LATE_FACTOR * median(self.seconds))
        return late and shard_id in self.left and shard_id not in self.helped

    def take_back(self, shards: Sequence[Shard], why: str | None) -> None:
        """Let shards wait again that a gang did not finish; none is a model that it did not open.

        Raises:
            RunFailed: one has failed `ATTEMPTS` times; ``why`` None is no failure.
        """
        unfinished = [shard for shard in shards if shard.shard_id in self.left]
        waiting = {shard.shard_id for shard in self.waiting}
        self.waiting.extendleft(reversed([shard for shard in unfinished if shard.shard_id not in waiting]))
        failed: list[int | None] = [shard.shard_id for shard in unfinished] if shards else [None]
        for key in failed if why else []:
            self._failures[key] += 1
            if self._failures[key] >= ATTEMPTS:
                what = "Opening the model" if key is None else f"Shard {key}"
                raise RunFailed(
                    f"{what} failed {ATTEMPTS} times; the last time: {why}", "Everything measured so far is kept."
                )

    def drop(self) -> None:
        """No result of it is of use any more."""
        self.left.clear()
        self.waiting.clear()
