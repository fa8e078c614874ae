"""Assignment of units to gangs, and replacement of gangs that leave, fail or hang.

A round has a unit for each rank of a gang, or one unit for all ranks if they share a batch. Short units are measured
several in a round. A gang gets its next round when it is done, so a slow gang never delays the others. While many
units are pending, a gang holds its next round in advance. A gang whose queue is empty opens the model of the next
queue. Gangs that the cluster has no room for wait for a place while others work, which tells an autoscaler how much is
wanted. Gangs on a draining node finish their round. The pool keeps no statistics: units that are lost with a gang are
measured again.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from queue import Empty, Queue
from typing import Any, Generic, TypeVar

from ray.exceptions import RayError, RayTaskError

from avss_dist.core.errors import AvssError, BatchTooLarge, RunFailed
from avss_dist.executors.ray.cluster import RayCluster, Watch
from avss_dist.executors.ray.gang import Gang, missing_package
from avss_dist.executors.ray.queue import UnitQueue
from avss_dist.partition.replica import Placement
from avss_dist.system.streams import say

T = TypeVar("T")
_END = object()


class Prefetcher(Generic[T]):
    """Items of an iterator, the next one prepared while the last one is used."""

    def __init__(self, items: Iterator[T]) -> None:
        self.exhausted = False
        self._queue: Queue[object] = Queue(maxsize=1)
        self._stopped = False
        self._items = items
        threading.Thread(target=self._fill, daemon=True).start()

    def next(self, *, wait: bool) -> T | None:
        """Return the next item; None at the end or, without ``wait``, if no item is ready.

        Raises:
            BaseException: the error that the iterator raised.
        """
        if self.exhausted:
            return None
        try:
            item = self._queue.get(block=wait)
        except Empty:
            return None
        if isinstance(item, _Raised):
            self.exhausted = True
            raise item.error
        if item is _END:
            self.exhausted = True
            return None
        return item  # type: ignore[return-value]

    def close(self) -> None:
        """Stop preparing items."""
        self._stopped = self.exhausted = True
        with self._queue.mutex:
            self._queue.queue.clear()
            self._queue.not_full.notify_all()

    def _fill(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._stopped:
                    return
        except BaseException as error:
            self._queue.put(_Raised(error))
        else:
            self._queue.put(_END)


class _Raised:
    def __init__(self, error: BaseException) -> None:
        self.error = error


Awaited = dict[Any, Sequence[int]]  # units by the reference to their results


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
    awaited: Awaited
    rows: int
    begun: float

    @property
    def is_coming(self) -> bool:
        """Whether its gang waits for a place."""
        return self.gang.placed in self.awaited


class Rounds:
    """Rounds that are under way. A gang has one, or two of which the second waits for the first.

    Args:
        clock: returns the monotonic time in seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._by_reference: dict[Any, Round] = {}
        self._by_gang: dict[Gang, list[Round]] = {}

    def __iter__(self) -> Iterator[Round]:
        return iter([round_ for rounds in self._by_gang.values() for round_ in rounds])

    @property
    def references(self) -> list[Any]:
        """Awaited references."""
        return list(self._by_reference)

    @property
    def gangs(self) -> Collection[Gang]:
        """Gangs that have a round."""
        return self._by_gang.keys()

    def find(self, reference: Any) -> Round | None:
        """Return the round that awaits a reference, or None."""
        return self._by_reference.get(reference)

    def rounds_of(self, gang: Gang) -> list[Round]:
        """Return the rounds of a gang: the current one, then the next."""
        return self._by_gang.get(gang, [])

    def waits(self, round_: Round) -> bool:
        """Whether a round waits for an earlier round of its gang."""
        return self._by_gang[round_.gang][0] is not round_

    def begin(self, round_: Round) -> None:
        """Add a round to those of its gang."""
        self._by_reference |= dict.fromkeys(round_.awaited, round_)
        self._by_gang.setdefault(round_.gang, []).append(round_)

    def receive(self, reference: Any) -> Sequence[int]:
        """Stop awaiting a reference, and return the units that it holds the results of."""
        return self._by_reference.pop(reference).awaited.pop(reference)

    def end(self, round_: Round) -> None:
        """Remove a round that is done or given up. The next one of its gang begins."""
        for reference in round_.awaited:
            self._by_reference.pop(reference, None)
        first, *later = self._by_gang.pop(round_.gang)
        if round_ is not first:
            self._by_gang[round_.gang] = [first]
        elif later:
            later[0].begun = self._clock()
            self._by_gang[round_.gang] = later

    def clear(self) -> None:
        """Forget all rounds."""
        self._by_reference.clear()
        self._by_gang.clear()


NOTICE_SECONDS = 15.0  # until the head knows that a node is dead; its workers may be lost before that


@dataclass(eq=False)
class _Loss:
    """The units of one queue that were lost with the workers of one node."""

    queue: UnitQueue[Any]
    node: str
    since: float
    units: set[int] = field(default_factory=set)


class Losses:
    """Workers that a pool has lost, until it is known whether their nodes are lost too."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        self._losses: dict[tuple[int, str], _Loss] = {}

    def add(self, queue: UnitQueue[Any], nodes: Iterable[str], units: Sequence[int]) -> None:
        """Note that workers on these nodes were lost while they had units of a queue, or opened its model."""
        for node in nodes:
            loss = self._losses.setdefault((id(queue), node), _Loss(queue, node, self._cluster.now()))
            loss.units.update(units)

    def tell(self) -> None:
        """Report the losses whose node is known to be dead, and those that have waited for `NOTICE_SECONDS`."""
        if not self._losses:
            return
        nodes = self._cluster.nodes()
        for key, loss in list(self._losses.items()):
            node = nodes.get(loss.node, {})
            waited = self._cluster.now() - loss.since > NOTICE_SECONDS
            if not node.get("Alive") or waited or not loss.queue.is_active:
                del self._losses[key]
                text = _text(loss, node)
                say(f"{datetime.now(UTC):%H:%M:%S} {text[0].upper()}{text[1:]}.")
                loss.queue.note(text)


def _text(loss: _Loss, node: dict[str, Any]) -> str:
    name = f"{node.get('NodeManagerAddress', '')} ({loss.node[:8]})".strip()
    lost = f"a worker on the node {name} was lost" if node.get("Alive") else f"the node {name} was lost"
    return f"{lost}; {loss.queue.describe_repeated(sorted(loss.units))}"


POLL_SECONDS = 2.0
SOON_SECONDS = 0.02  # to look again, while a gang is idle and the next queue is being planned


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
        queues: Prefetcher[UnitQueue[Any]],
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
        self._rounds = Rounds(cluster.now)
        self._idle: list[Gang] = []
        self._outcomes: list[tuple[Any, Any]] = []
        self._losses = Losses(cluster)
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
            self._preempt()
            yield from self._arrived()  # now that every gang has work
            self._wait()
            if not any(queue.is_active for queue in self._queues):
                yield from self._arrived()  # the next queue may wait for them
        yield from self._arrived()

    def close(self) -> None:
        """Stop every gang."""
        for gang in self._gangs():
            gang.stop()
        self._rounds.clear()
        self._idle = []

    def _arrived(self) -> list[tuple[Any, Any]]:
        self._losses.tell()  # before a run ends, for its row
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def _gangs(self) -> list[Gang]:
        return [*self._idle, *self._rounds.gangs]

    def _take_queues(self) -> bool:
        """Take the next queue as soon as no unit is pending. Returns False when all queues are done."""
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
        """Give idle gangs units."""
        for gang in list(self._idle):
            queue = next((q for q in self._queues if q.shape == gang.shape and self._has_work(q, gang)), None)
            if queue is None:
                self._speculate(gang)
            else:
                self._idle.remove(gang)
                self._dispatch(gang, queue)

    def _has_work(self, queue: UnitQueue[Any], gang: Gang) -> bool:
        """Whether a gang can take a unit, or open the model first: that need not wait until enough gangs are placed."""
        return bool(queue.pending) and (gang.spec != queue.spec or self._has_begun())

    def _has_begun(self) -> bool:
        self._begun = self._begun or self._placed() >= self._needed()
        return self._begun

    def _placed(self) -> int:
        return sum(gang.is_placed for gang in self._gangs())

    def _needed(self) -> int:
        """Return the number of gangs that must be placed before measurement begins."""
        return 1 if self._begun else min(self._minimum, max(1, self._queues[0].pending_rounds))

    def _hire(self) -> None:
        """Start gangs for pending units that no gang can take."""
        for queue in self._queues:
            placement = queue.spec.placement
            gangs = [gang for gang in self._gangs() if gang.shape == queue.shape and not gang.leaves]
            ready = sum(gang in gangs for gang in self._idle)
            ready += sum(r.gang in gangs and not r.units and (r.is_coming or r.queue is queue) for r in self._rounds)
            for _ in range(min(queue.pending_rounds - ready, self._replicas(placement) - len(gangs))):
                gang = self._new_gang(placement)
                self._begin(gang, queue, [], {gang.placed: ()})

    def _dismiss(self) -> None:
        """Stop unplaced gangs that have no unit left to take, so that no node is added for them."""
        wanted: Counter[tuple[int, int]] = Counter()
        for queue in self._queues:
            wanted[queue.shape] += queue.pending_rounds
        if not (wanted.total() or self._coming.exhausted):
            return  # units of the next queue may come
        for round_ in [r for r in self._rounds if not r.units]:
            if round_.is_coming and wanted[round_.gang.shape] <= 0 and not round_.gang.is_placed:
                self._stop(round_.gang)
            wanted[round_.gang.shape] -= 1

    def _preempt(self) -> None:
        """Stop idle gangs if a gang of another shape waits for their resources."""
        if not self._idle:
            return
        opening = {r.gang for r in self._rounds if not r.units}
        wanted = {gang.shape for gang in opening if not gang.is_placed}
        for gang in [gang for gang in self._idle if wanted - {gang.shape}]:
            self._idle.remove(gang)
            gang.stop()

    def _speculate(self, gang: Gang) -> None:
        """Let an idle gang take a round that was not begun, or repeat the slowest units. First results count."""
        now, alike = self._cluster.now(), [r for r in self._rounds if r.queue.shape == gang.shape]
        if waiting := [r for r in alike if self._rounds.waits(r)]:
            self._recall(waiting[0])
            self._idle.remove(gang)
            self._dispatch(gang, waiting[0].queue)
            return
        late = [r for r in alike if r.queue.is_late(r.units, now - r.begun)]
        if late:
            slowest = min(late, key=lambda r: r.begun)
            slowest.queue.speculate(slowest.units)
            self._idle.remove(gang)
            self._dispatch(gang, slowest.queue)

    def _recall(self, round_: Round) -> None:
        """Take back a round that its gang has not begun. If it begins at this moment, the units are measured twice."""
        round_.gang.cancel(round_.awaited)
        self._rounds.end(round_)
        self._outcomes += round_.queue.put_back(round_.units, None)

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
        first, *later = self._rounds.rounds_of(gang)
        if (
            first.units
            and not later
            and not gang.leaves
            and first.queue.runs_ahead(len(self._idle) + len(self._rounds.gangs))
        ):
            self._dispatch(gang, first.queue)

    def _begin(self, gang: Gang, queue: UnitQueue[Any], units: Sequence[int], awaited: Awaited) -> None:
        begun = self._cluster.now()
        self._rounds.begin(Round(gang=gang, queue=queue, units=units, awaited=awaited, rows=queue.rows, begun=begun))

    def _wait(self) -> None:
        """Wait for results and take those that have come. Check on gangs from time to time."""
        takes_next = not (self._coming.exhausted or any(queue.pending for queue in self._queues))
        soon = SOON_SECONDS if self._begun and self._idle and takes_next else self._poll
        if not (references := self._rounds.references):
            return
        if not self._cluster.wait(references, number=1, seconds=soon):
            self._require_placement()
        for reference in self._cluster.wait(references, number=len(references), seconds=0):
            self._moved = self._cluster.now()
            self._finish(reference)
        if self._cluster.now() - self._polled > self._poll:
            self._polled = self._cluster.now()
            self._cluster.require_node()
            self._look_after()
            self._let_go()

    def _finish(self, reference: Any) -> None:
        round_ = self._rounds.find(reference)
        if round_ is None:
            return  # its gang was stopped
        queue = round_.queue
        try:
            result = self._cluster.get(reference)
        except RayTaskError as error:
            self._fail(round_, error.cause)
            return
        except RayError as error:  # the worker, its node or the result was lost
            if missing := missing_package(error):
                self._outcomes += queue.fail([], missing)
            self._cluster.require_node()
            self._losses.add(queue, round_.gang.nodes, [unit for unit in round_.units if unit in queue.unfinished])
            self._stop(round_.gang, why=None if self._is_excused(round_) else str(error).splitlines()[0])
            return
        for unit, unit_result in zip(self._rounds.receive(reference), result or (), strict=False):
            self._outcomes += queue.finish(unit, unit_result)
        if not round_.awaited:
            if round_.units:
                queue.note_duration(round_.units, self._cluster.now() - round_.begun)
                queue.put_back(round_.units, None)  # units without a result
            elif reference != round_.gang.placed:
                round_.gang.spec = queue.spec
                queue.note_opened()
            self._free(round_)

    def _is_excused(self, round_: Round) -> bool:
        """Whether a loss does not count as a failure: the node is draining, or other gangs have opened the model."""
        opened = any(gang.spec == round_.queue.spec for gang in self._gangs())
        return round_.gang.leaves or (opened and not round_.units)

    def _free(self, round_: Round) -> None:
        """Give a gang that has finished a round its next one, or make it idle."""
        gang, queue = round_.gang, round_.queue
        self._rounds.end(round_)
        if gang.leaves:
            self._stop(gang)
        elif self._rounds.rounds_of(gang):
            self._dispatch_ahead(gang)
        elif queue.is_active and self._has_work(queue, gang):
            self._dispatch(gang, queue)
        else:
            self._idle.append(gang)

    def _fail(self, round_: Round, error: Exception) -> None:
        """Handle an exception that a rank raised."""
        if isinstance(error, BatchTooLarge) and round_.rows > 1:
            round_.queue.rows = min(round_.queue.rows, (round_.rows + 1) // 2)
            self._stop(round_.gang)
        elif not isinstance(error, AvssError):
            self._stop(round_.gang, why=f"{type(error).__name__}: {error}", failed=round_)
        else:
            self._outcomes += round_.queue.fail(round_.units, error)
            if len(round_.gang.names) > 1:  # the other ranks may wait for this one
                self._stop(round_.gang)
                return
            if not round_.units:
                round_.gang.spec = None
            self._free(round_)

    def _require_placement(self) -> None:
        """End a queue if the cluster has had no room for its gangs for too long."""
        placed, needed = self._placed(), self._needed()
        if placed >= needed or self._cluster.now() - self._moved <= self._placement_seconds:
            return
        queue = self._queues[0]
        who = f"Only {placed} of {needed} replicas were" if placed else "No worker was"
        why = f"{who} placed in {self._placement_seconds:.0f} seconds. {self._shortage(queue.spec.placement)}"
        hint = "Free some of it, lower `replicas`, `ranks` or `gpus_per_replica`, or use another cluster."
        self._outcomes += queue.fail([], RunFailed(why, hint))
        for gang in {r.gang for r in self._rounds if r.queue is queue}:
            self._stop(gang)
        self._moved = self._cluster.now()

    def _look_after(self) -> None:
        """Replace gangs with a rank that has begun no layer for too long, and note the progress of the others."""
        for gang in list(self._rounds.gangs) if self._watch.listen() else ():
            round_, *_ = self._rounds.rounds_of(gang)
            if why := self._watch.complaint(gang, round_.begun):
                self._stop(gang, why=why, hangs=True)
            elif doing := self._watch.doing(gang, round_.begun):
                round_.queue.note_progress(round_.units, *doing)

    def _let_go(self) -> None:
        """Stop gangs on draining nodes: at once if idle, otherwise when their round is done."""
        if not (draining := self._cluster.draining()):
            return
        self._cluster.leave(draining)
        for gang in self._gangs():
            gang.leaves = gang.leaves or bool(gang.nodes & draining)
        for gang in [gang for gang in self._idle if gang.leaves]:
            self._idle.remove(gang)
            gang.stop()
        for gang in {r.gang for r in self._rounds if r.gang.leaves and not r.units}:
            self._stop(gang)
        for round_ in [r for r in self._rounds if r.gang.leaves and self._rounds.waits(r)]:
            self._recall(round_)

    def _stop(self, gang: Gang, *, why: str | None = None, failed: Round | None = None, hangs: bool = False) -> None:
        """Stop a gang and make its unfinished units pending again.

        Args:
            why: reason that counts as a failure of the units; None does not count.
            failed: round that failed. Without one, no round of several is taken to have failed: their units are then
                measured one by one, which shows the failing one.
            hangs: whether to kill the processes by a signal.
        """
        gang.stop(hangs=hangs)
        rounds = list(self._rounds.rounds_of(gang))
        for round_ in reversed(rounds):
            self._rounds.end(round_)
            reason = why if round_ is failed or len(rounds) == 1 else None
            self._outcomes += round_.queue.put_back(round_.units, reason, round_.begun)
