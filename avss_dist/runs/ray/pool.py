"""Assignment of units to gangs, and replacement of gangs that leave, fail or hang.

A round has a unit for each rank of a gang, or one unit for all ranks if they share a batch. Short units are measured
several in a round. A gang gets its next round when it is done, so a slow gang never delays the others. While many
units are pending, a gang holds its next round in advance. A gang whose queue is empty opens the model of the next
queue. Gangs that the cluster has no room for wait for a place while others work, which tells an autoscaler how much is
wanted. Gangs on a draining node finish their round. The pool keeps no statistics: units that are lost with a gang are
measured again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import chain
from operator import attrgetter
from typing import Any, Generic, TypeVar

from ray import ObjectRef
from ray.exceptions import RayError, RayTaskError

from avss_dist.core.errors import AvssError, BatchTooLarge, RunFailed
from avss_dist.core.streams import say
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.cluster import RayCluster, Watch
from avss_dist.runs.ray.gang import Gang, missing_package
from avss_dist.runs.ray.queue import AnyQueue, OwnedOutcome
from avss_dist.runs.ray.worker import UnitResult
from avss_dist.runs.threads import Submissions

T = TypeVar("T")
POLL_SECONDS = 2.0
SOON_SECONDS = 0.02  # to look again, while a gang is idle and the next queue is being planned
NOTICE_SECONDS = 15.0  # until the head knows that a node is dead; its workers may be lost before that


class QueueSource(Generic[T]):
    """The queues of what another thread submits.

    Args:
        submitted: runs, or rounds of cells.
        queues_of: returns the queues of one of them.
    """

    def __init__(self, submitted: Submissions[T], queues_of: Callable[[T], Iterable[AnyQueue]]) -> None:
        self._submitted = submitted
        self._queues_of = queues_of
        self._ready: deque[AnyQueue] = deque()

    @property
    def exhausted(self) -> bool:
        """Whether no queue comes any more."""
        return self._submitted.exhausted and not self._ready

    def wait(self) -> bool:
        """Wait for a queue. Returns False if none comes."""
        while not self._ready:
            if not self._take(wait=True):
                return False
        return True

    def _take(self, *, wait: bool) -> bool:
        """Take what was submitted next, and make its queues. Returns False at the end, or if nothing is ready."""
        item = self._submitted.take(wait=wait)
        if item is None:
            return False
        self._ready.extend(self._queues_of(item))
        return True

    def next(self, *, wait: bool) -> AnyQueue | None:
        """Return the next queue. None at the end or, without ``wait``, if no queue is ready."""
        if wait:
            self.wait()
        elif not self._ready:
            self._take(wait=False)
        if not self._ready:
            return None
        return self._ready.popleft()


@dataclass(eq=False, kw_only=True)
class Round:
    """Current work of a gang: waiting for a place, opening a model (both without units), or measuring.

    Attributes:
        queue: queue whose model is opened or measured; for a gang that waits for a place, the queue that started it.
        awaited: units by the reference to their results.
        rows: rows in a batch.
        begun: monotonic time when the gang got the round, or finished the one before it.
    """

    gang: Gang
    queue: AnyQueue
    units: Sequence[int]
    awaited: dict[ObjectRef, Sequence[int]]
    rows: int
    begun: float

    @property
    def is_coming(self) -> bool:
        """Whether its gang waits for a place."""
        return self.gang.placed in self.awaited


@dataclass
class Loss:
    """The loss of workers of a queue on one node.

    Attributes:
        since: monotonic time of the first loss.
        units: units without a result that the workers had.
    """

    since: float
    units: set[int] = field(default_factory=set)


class Pool:
    """The gangs of one executor, and the queues that they work on.

    Args:
        new_gang: starts a gang for a placement.
        replicas: returns how many gangs of a placement may work at once.
        minimum: gangs that the first queue waits for, if it has units for as many.
        cluster: the Ray cluster of the gangs.
        placement_seconds: how long to wait for a gang to be placed, while none works, or fewer than are waited for.
        hang_seconds: how long a rank may begin no layer before its gang is stopped.
        shortage: describes the resources that a placement needs and the cluster lacks.
    """

    def __init__(
        self,
        queues: QueueSource[Any],
        *,
        new_gang: Callable[[Placement], Gang],
        replicas: Callable[[Placement], int],
        minimum: int,
        cluster: RayCluster,
        placement_seconds: float,
        hang_seconds: float,
        shortage: Callable[[Placement], str],
    ) -> None:
        self._coming = queues
        self._new_gang = new_gang
        self._replicas = replicas
        self._shortage = shortage
        self._cluster = cluster
        self._watch = Watch(cluster, hang_seconds)
        self._minimum = minimum
        self._has_measured = minimum == 1  # From the first measurement on, no minimum is waited for.
        self._placement_seconds = placement_seconds
        self._check_seconds = min(POLL_SECONDS, hang_seconds / 4)
        self._queues: list[AnyQueue] = []  # in the order in which they came
        self._gangs: dict[Gang, list[Round]] = {}  # none if it is idle, or the current one, and one that waits for it
        self._outcomes: list[OwnedOutcome] = []
        self._losses: dict[tuple[AnyQueue, str], Loss] = {}  # by queue and node
        self._progressed_at = cluster.now()
        self._checked_at = cluster.now()

    def outcomes(self) -> Iterator[OwnedOutcome]:
        """Yield the outcomes of every queue as units are finished.

        An error among them is an AvssError of a model or a unit, or RunFailed: no gang was placed in time; a unit, or
        opening the model, failed too often.

        Raises:
            RunFailed: the cluster, or the node of this process, is lost.
        """
        while self._take_queues():
            self._give_work_to_idle_gangs()
            self._start_gangs()
            self._stop_useless_gangs()
            yield from self._take_outcomes()  # The driver handles them while every gang has work.
            self._wait_for_results()
            if not any(queue.is_active for queue in self._queues):
                yield from self._take_outcomes()  # The next queue may wait for them.
        yield from self._take_outcomes()

    def close(self) -> None:
        """Stop every gang."""
        for gang in self._gangs:
            gang.stop()

    def _take_outcomes(self) -> list[OwnedOutcome]:
        """Return the outcomes since the last call, after a report of lost nodes and of workers whose nodes are alive.

        It comes before a run ends, for its row.
        """
        outcomes = self._report_losses() + self._outcomes
        self._outcomes = []
        return outcomes

    def _report_losses(self) -> list[OwnedOutcome]:
        """Print which nodes and workers were lost, once it is known which, and return notes for the rows of runs."""
        if not self._losses:
            return []
        notes: list[OwnedOutcome] = []
        nodes = self._cluster.nodes()
        for (queue, node_id), loss in list(self._losses.items()):
            node = nodes.get(node_id, {})
            is_alive = bool(node.get("Alive"))
            has_waited = self._cluster.now() - loss.since > NOTICE_SECONDS
            if is_alive and not has_waited and queue.is_active:
                continue
            del self._losses[queue, node_id]
            where = f"{node.get('NodeManagerAddress', '')} ({node_id[:8]})".strip()
            what = f"a worker on the node {where}" if is_alive else f"the node {where}"
            text = f"{what} was lost; {queue.describe_repeated(sorted(loss.units))}"
            say(f"{datetime.now(UTC):%H:%M:%S} {text[0].upper()}{text[1:]}.")
            notes += queue.note(text)
        return notes

    @property
    def _rounds(self) -> list[Round]:
        return list(chain.from_iterable(self._gangs.values()))

    @property
    def _idle(self) -> list[Gang]:
        return [gang for gang, rounds in self._gangs.items() if not rounds]

    def _take_queues(self) -> bool:
        """Take the next queue as soon as no unit is pending. Returns False when all queues are done."""
        for taken in self._queues:
            taken.discard_dropped()
        self._queues = [queue for queue in self._queues if queue.is_active]
        while not any(queue.pending for queue in self._queues):
            queue = self._coming.next(wait=not self._queues)
            if queue is None:
                break
            queue.clock = self._cluster.now
            self._queues.append(queue)
            self._progressed_at = self._cluster.now()
        return bool(self._queues)

    def _give_work_to_idle_gangs(self) -> None:
        """Give idle gangs pending units, or the slowest ones that others measure: first results count."""
        for gang in self._idle:
            queue = self._queue_with_work(gang) or self._repeat_late_units(gang)
            if queue is not None:
                self._dispatch(gang, queue)

    def _queue_with_work(self, gang: Gang) -> AnyQueue | None:
        """Return the first queue that has work for a gang, or None."""
        for queue in self._queues:
            if queue.shape == gang.shape and self._has_work(queue, gang):
                return queue
        return None

    def _repeat_late_units(self, gang: Gang) -> AnyQueue | None:
        """Make the units of the round that is most late pending again, for an idle gang, and return their queue.

        Returns None if no round is late.
        """
        alike = [round_ for round_ in self._rounds if round_.queue.shape == gang.shape]
        alike.sort(key=attrgetter("begun"))
        for round_ in alike:
            if round_.queue.repeat_late(round_.units, self._cluster.now() - round_.begun):
                return round_.queue
        return None

    def _has_work(self, queue: AnyQueue, gang: Gang) -> bool:
        """Whether a gang can take a unit, or open the model first: that need not wait until enough gangs are placed."""
        if not queue.pending:
            return False
        if gang.spec != queue.spec:
            return True
        return self._has_measured or self._placed() >= self._needed()

    def _placed(self) -> int:
        return sum(gang.is_placed for gang in self._gangs)

    def _needed(self) -> int:
        """Return the number of gangs that must be placed before measurement begins."""
        if self._has_measured:
            return 1
        return min(self._minimum, max(1, self._queues[0].pending_rounds))

    def _start_gangs(self) -> None:
        """Start gangs for pending units that no gang can take."""
        for queue in self._queues:
            placement = queue.spec.placement
            gangs = [gang for gang in self._gangs if gang.shape == queue.shape and not gang.leaves]
            ready = sum(self._will_be_ready(gang, queue) for gang in gangs)
            wanted = queue.pending_rounds - ready
            allowed = self._replicas(placement) - len(gangs)
            for _ in range(min(wanted, allowed)):
                gang = self._new_gang(placement)
                self._begin(gang, queue, [], {gang.placed: ()})

    def _will_be_ready(self, gang: Gang, queue: AnyQueue) -> bool:
        """Whether a gang takes a pending round of a queue next: it is idle, is coming, or opens the queue's model."""
        rounds = self._gangs[gang]
        if not rounds:
            return True
        current = rounds[0]
        if current.units:
            return False
        return current.is_coming or current.queue is queue

    def _stop_useless_gangs(self) -> None:
        """Stop unplaced gangs without a unit to take, so that no node is added for them, and idle gangs in their way.

        An idle gang is in the way of a gang of another shape that waits for its resources.
        """
        pending: Counter[tuple[int, int]] = Counter()  # rounds that no gang will take, by shape
        for queue in self._queues:
            pending[queue.shape] += queue.pending_rounds
        if pending.total() or self._coming.exhausted:  # otherwise units of the next queue may come
            for round_ in [round_ for round_ in self._rounds if not round_.units]:
                gang = round_.gang
                if round_.is_coming and pending[gang.shape] <= 0 and not gang.is_placed:
                    self._stop(gang)
                pending[gang.shape] -= 1
        idle = self._idle
        if idle:
            waiting = {round_.gang.shape for round_ in self._rounds if not round_.units and not round_.gang.is_placed}
            for gang in idle:
                if waiting - {gang.shape}:
                    self._stop(gang)

    def _dispatch(self, gang: Gang, queue: AnyQueue) -> None:
        """Begin a round: open the queue's model, or measure the next of its units."""
        if gang.spec != queue.spec:
            self._begin(gang, queue, [], dict.fromkeys(gang.open(queue.spec), ()))
            return
        self._has_measured = True
        units = queue.next_units(self._replicas(queue.spec.placement))
        references = gang.measure(queue.parts(units))
        self._begin(gang, queue, units, dict(zip(references, queue.by_rank(units), strict=True)))
        self._dispatch_ahead(gang)

    def _dispatch_ahead(self, gang: Gang) -> None:
        """Give a measuring gang its next round in advance, if enough units are pending."""
        first, *later = self._gangs[gang]
        if first.units and not later and not gang.leaves and first.queue.runs_ahead(len(self._gangs)):
            self._dispatch(gang, first.queue)

    def _begin(
        self, gang: Gang, queue: AnyQueue, units: Sequence[int], awaited: dict[ObjectRef, Sequence[int]]
    ) -> None:
        round_ = Round(gang=gang, queue=queue, units=units, awaited=awaited, rows=queue.rows, begun=self._cluster.now())
        self._gangs.setdefault(gang, []).append(round_)

    def _wait_for_results(self) -> None:
        """Wait for results and take those that have come. Check on gangs from time to time."""
        rounds: dict[ObjectRef, Round] = {}
        for round_ in self._rounds:
            rounds |= dict.fromkeys(round_.awaited, round_)
        if not rounds:
            return
        if not self._cluster.wait([*rounds], number=1, seconds=self._seconds_to_wait()):
            self._require_placement()
        for reference in self._cluster.wait([*rounds], number=len(rounds), seconds=0):
            self._progressed_at = self._cluster.now()
            if reference in rounds[reference].awaited:  # otherwise its gang was stopped
                self._take_result(reference, rounds[reference])
        if self._cluster.now() - self._checked_at > self._check_seconds:
            self._checked_at = self._cluster.now()
            self._cluster.require_node()
            self._replace_hanging_gangs()
            self._release_draining_gangs()

    def _seconds_to_wait(self) -> float:
        """Return how long to wait for a result. An idle gang waits for the next queue, which comes at any moment."""
        takes_next = not self._coming.exhausted and not any(queue.pending for queue in self._queues)
        if self._has_measured and takes_next and self._idle:
            return SOON_SECONDS
        return self._check_seconds

    def _take_result(self, reference: ObjectRef, round_: Round) -> None:
        """Take what a rank returned, or handle the loss of it."""
        try:
            result = self._cluster.get(reference)
        except RayTaskError as error:
            self._fail(round_, error.cause)
        except RayError as error:  # the worker, its node or the result was lost
            self._replace_lost_gang(round_, error)
        else:
            self._finish(reference, round_, result or ())

    def _replace_lost_gang(self, round_: Round, error: RayError) -> None:
        """Stop a gang with a lost rank, and note the loss on the nodes of its ranks."""
        gang = round_.gang
        queue = round_.queue
        missing = missing_package(error)
        if missing is not None:
            self._outcomes += queue.fail([], missing)
        self._cluster.require_node()
        for node_id in gang.nodes:
            loss = self._losses.setdefault((queue, node_id), Loss(since=self._cluster.now()))
            loss.units.update(queue.unfinished.intersection(round_.units))
        # It counts as no failure if the node is draining, or if other gangs have opened the model.
        opens_elsewhere = not round_.units and any(other.spec == queue.spec for other in self._gangs)
        if gang.leaves or opens_elsewhere:
            self._stop(gang)
        else:
            self._stop(gang, why=str(error).splitlines()[0])

    def _finish(self, reference: ObjectRef, round_: Round, results: Sequence[UnitResult | None]) -> None:
        """Take the results of a rank. After those of all ranks, the gang gets its next round."""
        queue = round_.queue
        for unit, unit_result in zip(round_.awaited.pop(reference), results, strict=False):
            self._outcomes += queue.finish(unit, unit_result)
        if round_.awaited:
            return
        if round_.units:
            queue.note_duration(round_.units, self._cluster.now() - round_.begun)
            queue.put_back(round_.units, None)  # units without a result
        elif reference != round_.gang.placed:
            round_.gang.spec = queue.spec
            queue.note_opened()
        self._free(round_)

    def _free(self, round_: Round) -> None:
        """Give a gang that has finished a round its next one, or make it idle."""
        gang = round_.gang
        queue = round_.queue
        self._end(round_)
        if self._gangs[gang]:
            self._dispatch_ahead(gang)
        elif gang.leaves:
            self._stop(gang)
        elif queue.is_active and self._has_work(queue, gang):
            self._dispatch(gang, queue)

    def _end(self, round_: Round) -> None:
        """Remove a round that is done or given up. The next one of its gang begins."""
        round_.awaited.clear()
        first, *later = self._gangs[round_.gang]
        if round_ is first and later:
            later[0].begun = self._cluster.now()
        self._gangs[round_.gang].remove(round_)

    def _fail(self, round_: Round, error: Exception) -> None:
        """Handle an exception that a rank raised."""
        if isinstance(error, BatchTooLarge) and round_.rows > 1:
            round_.queue.rows = min(round_.queue.rows, (round_.rows + 1) // 2)
            self._stop(round_.gang)
        elif not isinstance(error, AvssError):
            self._stop(round_.gang, why=f"{type(error).__name__}: {error}", failed=round_)
        else:
            self._outcomes += round_.queue.fail(round_.units, error)
            if not round_.units:
                round_.gang.spec = None
            if len(round_.gang.names) > 1:  # the other ranks may wait for this one
                self._stop(round_.gang)
            else:
                self._free(round_)

    def _require_placement(self) -> None:
        """End a queue if the cluster has had no room for its gangs for too long."""
        placed = self._placed()
        needed = self._needed()
        if placed >= needed or self._cluster.now() - self._progressed_at <= self._placement_seconds:
            return
        queue = self._queues[0]
        who = f"Only {placed} of {needed} replicas were" if placed else "No worker was"
        error = RunFailed(
            f"{who} placed in {self._placement_seconds:.0f} seconds. {self._shortage(queue.spec.placement)}",
            "Free some of it, lower `replicas`, `ranks` or `gpus_per_replica`, or use another cluster.",
        )
        self._outcomes += queue.fail([], error)
        for gang in {round_.gang for round_ in self._rounds if round_.queue is queue}:
            self._stop(gang)
        self._progressed_at = self._cluster.now()

    def _replace_hanging_gangs(self) -> None:
        """Replace gangs with a rank that has begun no layer for too long, and note the progress of the others."""
        if not self._watch.listen():
            return
        for gang, rounds in list(self._gangs.items()):
            if not rounds:
                continue
            current = rounds[0]
            why = self._watch.complaint(gang, current.begun)
            if why:
                self._stop(gang, why=why, hangs=True)
                continue
            doing = self._watch.doing(gang, current.begun)
            if doing:
                current.queue.note_progress(current.units, *doing)

    def _release_draining_gangs(self) -> None:
        """Stop gangs on draining nodes: at once if they measure nothing, otherwise when they are done."""
        draining = self._cluster.draining()
        if not draining:
            return
        for gang, rounds in list(self._gangs.items()):
            gang.leaves = gang.leaves or bool(gang.nodes & draining)
            if gang.leaves and not any(round_.units for round_ in rounds):
                self._stop(gang)

    def _stop(self, gang: Gang, *, why: str | None = None, failed: Round | None = None, hangs: bool = False) -> None:
        """Stop a gang and make its unfinished units pending again.

        Args:
            why: reason that counts as a failure of the units; None does not count.
            failed: round that failed. Without one, no round of several is taken to have failed: their units are then
                measured one by one, which shows the failing one.
            hangs: whether to kill the processes by a signal.
        """
        gang.stop(hangs=hangs)
        rounds = [*self._gangs[gang]]
        for round_ in reversed(rounds):
            self._end(round_)
            reason = why if round_ is failed or len(rounds) == 1 else None
            self._outcomes += round_.queue.put_back(round_.units, reason, round_.begun)
        del self._gangs[gang]
