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
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Generic, TypeVar

from ray.exceptions import RayError, RayTaskError

from avss_dist.core.errors import AvssError, BatchTooLarge, RunFailed
from avss_dist.core.streams import say
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.cluster import RayCluster, Watch
from avss_dist.runs.ray.gang import Gang, missing_package
from avss_dist.runs.ray.queue import UnitQueue
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

    def __init__(self, submitted: Submissions[T], queues_of: Callable[[T], Iterable[UnitQueue[Any]]]) -> None:
        self._submitted, self._queues_of = submitted, queues_of
        self._ready: deque[UnitQueue[Any]] = deque()

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

    def next(self, *, wait: bool) -> UnitQueue[Any] | None:
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
    queue: UnitQueue[Any]
    units: Sequence[int]
    awaited: dict[Any, Sequence[int]]
    rows: int
    begun: float

    @property
    def is_coming(self) -> bool:
        """Whether its gang waits for a place."""
        return self.gang.placed in self.awaited


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
        self._new_gang, self._replicas, self._shortage = new_gang, replicas, shortage
        self._cluster, self._watch = cluster, Watch(cluster, hang_seconds)
        self._minimum, self._begun = minimum, minimum == 1
        self._placement_seconds, self._poll = placement_seconds, min(POLL_SECONDS, hang_seconds / 4)
        self._queues: list[UnitQueue[Any]] = []  # in the order in which they came
        self._gangs: dict[Gang, list[Round]] = {}  # none if it is idle, or the current one, and one that waits for it
        self._outcomes: list[tuple[Any, Any]] = []
        self._losses: dict[tuple[UnitQueue[Any], str], tuple[float, set[int]]] = {}  # by queue and node
        self._moved = self._polled = cluster.now()

    def outcomes(self) -> Iterator[tuple[Any, Any]]:
        """Yield the outcomes of every queue as units are finished.

        An error among them is an AvssError of a model or a unit, or RunFailed: no gang was placed in time; a unit, or
        opening the model, failed too often.

        Raises:
            RunFailed: the cluster, or the node of this process, is lost.
        """
        while self._take_queues():
            self._assign()
            self._hire()
            self._dismiss()
            yield from self._arrived()  # now that every gang has work
            self._wait()
            if not any(queue.is_active for queue in self._queues):
                yield from self._arrived()  # the next queue may wait for them
        yield from self._arrived()

    def close(self) -> None:
        """Stop every gang."""
        for gang in self._gangs:
            gang.stop()

    def _arrived(self) -> list[tuple[Any, Any]]:
        """Return the outcomes since the last call, after a report of lost nodes and of workers whose nodes are alive.

        It comes before a run ends, for its row.
        """
        notes: list[tuple[Any, Any]] = []
        nodes = self._cluster.nodes() if self._losses else {}
        for (queue, name), (since, units) in list(self._losses.items()):
            node = nodes.get(name, {})
            is_alive, waited = node.get("Alive"), self._cluster.now() - since > NOTICE_SECONDS
            if not is_alive or waited or not queue.is_active:
                del self._losses[queue, name]
                where = f"{node.get('NodeManagerAddress', '')} ({name[:8]})".strip()
                lost = f"{'a worker on ' if is_alive else ''}the node {where} was lost"
                text = f"{lost}; {queue.describe_repeated(sorted(units))}"
                say(f"{datetime.now(UTC):%H:%M:%S} {text[0].upper()}{text[1:]}.")
                notes += queue.note(text)
        outcomes = notes + self._outcomes
        self._outcomes = []
        return outcomes

    @property
    def _rounds(self) -> list[Round]:
        return [round_ for rounds in self._gangs.values() for round_ in rounds]

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
            self._moved = self._cluster.now()
        return bool(self._queues)

    def _assign(self) -> None:
        """Give idle gangs units, or the slowest ones that others measure: first results count."""
        now = self._cluster.now()
        for gang in self._idle:
            queue = next((q for q in self._queues if q.shape == gang.shape and self._has_work(q, gang)), None)
            if queue is None:
                alike = sorted((r for r in self._rounds if r.queue.shape == gang.shape), key=lambda r: r.begun)
                queue = next((r.queue for r in alike if r.queue.repeat_late(r.units, now - r.begun)), None)
            if queue is not None:
                self._dispatch(gang, queue)

    def _has_work(self, queue: UnitQueue[Any], gang: Gang) -> bool:
        """Whether a gang can take a unit, or open the model first: that need not wait until enough gangs are placed."""
        if not queue.pending or gang.spec != queue.spec:
            return bool(queue.pending)
        self._begun = self._begun or self._placed() >= self._needed()
        return self._begun

    def _placed(self) -> int:
        return sum(gang.is_placed for gang in self._gangs)

    def _needed(self) -> int:
        """Return the number of gangs that must be placed before measurement begins."""
        return 1 if self._begun else min(self._minimum, max(1, self._queues[0].pending_rounds))

    def _hire(self) -> None:
        """Start gangs for pending units that no gang can take."""
        for queue in self._queues:
            placement = queue.spec.placement
            gangs = [gang for gang in self._gangs if gang.shape == queue.shape and not gang.leaves]
            ready = sum(not self._gangs[gang] for gang in gangs)
            ready += sum(r.gang in gangs and not r.units and (r.is_coming or r.queue is queue) for r in self._rounds)
            for _ in range(min(queue.pending_rounds - ready, self._replicas(placement) - len(gangs))):
                gang = self._new_gang(placement)
                self._begin(gang, queue, [], {gang.placed: ()})

    def _dismiss(self) -> None:
        """Stop unplaced gangs without a unit to take, so that no node is added for them, and idle gangs in their way.

        An idle gang is in the way of a gang of another shape that waits for its resources.
        """
        rounds: Counter[tuple[int, int]] = Counter()
        for queue in self._queues:
            rounds[queue.shape] += queue.pending_rounds
        if rounds.total() or self._coming.exhausted:  # otherwise units of the next queue may come
            for round_ in [r for r in self._rounds if not r.units]:
                if round_.is_coming and rounds[round_.gang.shape] <= 0 and not round_.gang.is_placed:
                    self._stop(round_.gang)
                rounds[round_.gang.shape] -= 1
        if idle := self._idle:
            waiting = {r.gang.shape for r in self._rounds if not r.units and not r.gang.is_placed}
            for gang in [gang for gang in idle if waiting - {gang.shape}]:
                self._stop(gang)

    def _dispatch(self, gang: Gang, queue: UnitQueue[Any]) -> None:
        """Begin a round: open the queue's model, or measure the next of its units."""
        if gang.spec != queue.spec:
            self._begin(gang, queue, [], dict.fromkeys(gang.open(queue.spec), ()))
            return
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
        self, gang: Gang, queue: UnitQueue[Any], units: Sequence[int], awaited: dict[Any, Sequence[int]]
    ) -> None:
        round_ = Round(gang=gang, queue=queue, units=units, awaited=awaited, rows=queue.rows, begun=self._cluster.now())
        self._gangs.setdefault(gang, []).append(round_)

    def _wait(self) -> None:
        """Wait for results and take those that have come. Check on gangs from time to time."""
        rounds = {reference: round_ for round_ in self._rounds for reference in round_.awaited}
        if not rounds:
            return
        takes_next = not (self._coming.exhausted or any(queue.pending for queue in self._queues))
        soon = SOON_SECONDS if self._begun and takes_next and self._idle else self._poll
        if not self._cluster.wait([*rounds], number=1, seconds=soon):
            self._require_placement()
        for reference in self._cluster.wait([*rounds], number=len(rounds), seconds=0):
            self._moved = self._cluster.now()
            if reference in rounds[reference].awaited:  # otherwise its gang was stopped
                self._finish(reference, rounds[reference])
        if self._cluster.now() - self._polled > self._poll:
            self._polled = self._cluster.now()
            self._cluster.require_node()
            self._look_after()
            self._let_go()

    def _finish(self, reference: Any, round_: Round) -> None:
        gang, queue = round_.gang, round_.queue
        try:
            result = self._cluster.get(reference)
        except RayTaskError as error:
            self._fail(round_, error.cause)
        except RayError as error:  # the worker, its node or the result was lost
            if missing := missing_package(error):
                self._outcomes += queue.fail([], missing)
            self._cluster.require_node()
            for node in gang.nodes:
                _, units = self._losses.setdefault((queue, node), (self._cluster.now(), set()))
                units.update(queue.unfinished.intersection(round_.units))
            # It counts as no failure if the node is draining, or if other gangs have opened the model.
            excused = gang.leaves or (not round_.units and any(other.spec == queue.spec for other in self._gangs))
            self._stop(gang, why=None if excused else str(error).splitlines()[0])
        else:
            for unit, unit_result in zip(round_.awaited.pop(reference), result or (), strict=False):
                self._outcomes += queue.finish(unit, unit_result)
            if not round_.awaited:
                if round_.units:
                    queue.note_duration(round_.units, self._cluster.now() - round_.begun)
                    queue.put_back(round_.units, None)  # units without a result
                elif reference != gang.placed:
                    gang.spec = queue.spec
                    queue.note_opened()
                self._free(round_)

    def _free(self, round_: Round) -> None:
        """Give a gang that has finished a round its next one, or make it idle."""
        gang, queue = round_.gang, round_.queue
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
        placed, needed = self._placed(), self._needed()
        if placed >= needed or self._cluster.now() - self._moved <= self._placement_seconds:
            return
        queue = self._queues[0]
        who = f"Only {placed} of {needed} replicas were" if placed else "No worker was"
        error = RunFailed(
            f"{who} placed in {self._placement_seconds:.0f} seconds. {self._shortage(queue.spec.placement)}",
            "Free some of it, lower `replicas`, `ranks` or `gpus_per_replica`, or use another cluster.",
        )
        self._outcomes += queue.fail([], error)
        for gang in {r.gang for r in self._rounds if r.queue is queue}:
            self._stop(gang)
        self._moved = self._cluster.now()

    def _look_after(self) -> None:
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

    def _let_go(self) -> None:
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
