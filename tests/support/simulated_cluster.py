"""A Ray cluster in memory, with a clock of its own: nodes, gangs and results, for tests of scheduling.

`SimulatedCluster` takes the place of `runs.ray.cluster.RayCluster`, `SimulatedGang` that of
`runs.ray.gang.Gang`, and `PlannedQueues` that of `runs.ray.pool.QueueSource`. A second passes only when the
scheduler waits. What Ray does is what tests on a real cluster in `tests/runs/test_ray.py` saw it do.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayActorError, RayTaskError

from avss_dist.partition.catalog import PARTITIONS
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.heartbeats import Doing, Sign
from avss_dist.runs.ray.queue import UnitQueue, shape
from avss_dist.runs.work import ReplicaSpec

OPEN_SECONDS = 1.0
UNIT_SECONDS = 1.0
SPINS = 500  # of the scheduler without waiting, after which it counts as endless


class Dies(Exception):
    """Raised by an answer: the process that computes it dies, which Ray reports with this text."""


@dataclass(eq=False)
class Reference:
    """A result that is there at a time; `inf` while nothing will bring it."""

    due: float = math.inf
    value: Any = None
    error: Exception | None = None


@dataclass(eq=False)
class Node:
    """A node with room for a number of ranks."""

    name: str
    slots: int
    draining: bool = False


@dataclass(eq=False)
class Call:
    """A call of one rank.

    Attributes:
        answer: computes the value at the end.
        begins, ends: times between which the rank computes.
    """

    reference: Reference
    answer: Callable[[], Any]
    begins: float
    ends: float

    def delay(self, seconds: float) -> None:
        """Have it end later."""
        self.ends += seconds


def result_of(assignment: Any) -> Any:
    """Return what stands for the result of an assignment: its shard or cell; None for a rank without one."""
    return getattr(assignment, "shard", None) or getattr(assignment, "cell", None)


class SimulatedGang:
    """Ranks that are placed, open models and measure units in virtual time. See `runs.ray.gang.Gang`."""

    def __init__(self, cluster: SimulatedCluster, name: str, placement: Placement) -> None:
        self.cluster = cluster
        self.placement = placement
        self.shape = shape(placement)
        self.spec = None
        self.leaves = False
        self.names = [f"{name}.{rank}" for rank in range(placement.ranks)]
        self.placed = Reference()
        self.slowness = 1.0
        self.frozen = math.inf
        self.reports = True
        self.stopped = False
        self.killed_by_signal = False
        self.opened: list[ReplicaSpec] = []
        self.measured: list[Any] = []  # assignments that a rank has finished
        self._nodes: list[Node] = []
        self._calls: list[list[Call]] = [[] for _ in self.names]
        self._lost: dict[int, float] = {}  # ranks without a process, and since when
        self._worked = -math.inf

    @property
    def is_placed(self) -> bool:
        return bool(self._nodes)

    @property
    def nodes(self) -> set[str]:
        return {node.name for node in self._nodes}

    @property
    def is_lost(self) -> bool:
        """Whether a rank has no process any more."""
        return bool(self._lost)

    def find_processes(self) -> list[str]:
        return self.names if self._nodes else []

    def place(self, nodes: list[Node]) -> None:
        self._nodes = nodes
        self._worked = clock = self.cluster.clock
        if self.frozen == math.inf:
            self.placed.due = clock
        for calls in self._calls:
            for call in calls:  # a task is given before there is a place
                call.begins = clock
                call.ends = clock + UNIT_SECONDS

    def open(self, spec: ReplicaSpec) -> list[Reference]:
        self.opened.append(spec)
        return [
            self._call(rank, lambda rank=rank: self.cluster.on_open(self, spec, rank), OPEN_SECONDS)
            for rank in range(len(self.names))
        ]

    def measure(self, parts: Sequence[Sequence[Any]]) -> list[Reference]:
        references = []
        for rank, work in enumerate(parts):
            answer = lambda rank=rank, work=work: self._measure_round(rank, work)  # noqa: E731
            references.append(self._call(rank, answer, UNIT_SECONDS * len(work)))
        return references

    def run(self, task: Any) -> list[Reference]:
        return [
            self._call(rank, lambda rank=rank: self.cluster.on_task(self, task, rank), UNIT_SECONDS)
            for rank in range(len(self.names))
        ]

    def _measure_round(self, rank: int, assignments: Sequence[Any]) -> list[Any]:
        """Compute what `runs.ray.worker.Worker.measure_round` returns."""
        results: list[Any] = []
        for assignment in assignments:
            try:
                result = self.cluster.on_measure(self, assignment, rank)
            except Dies:
                raise
            except Exception:
                if not results:
                    raise
                break
            self.measured.append(assignment)
            reports = rank == 0 or PARTITIONS[self.placement.partition].splits_data
            results.append(result if reports else None)
        return results

    def _call(self, rank: int, answer: Callable[[], Any], seconds: float) -> Reference:
        reference = Reference()
        begins = max([self.cluster.clock, self.placed.due, *(call.ends for call in self._calls[rank])])
        self._calls[rank].append(Call(reference, answer, begins, begins + seconds * self.slowness))
        if rank in self._lost:
            self._fail(rank)
        return reference

    def advance(self, clock: float) -> None:
        """End the calls that are due by a time."""
        for rank, calls in enumerate(self._calls):
            while calls and calls[0].ends <= clock and not self._is_stuck():
                call = calls.pop(0)
                self._worked = call.ends
                try:
                    call.reference.value = call.answer()
                except Dies as death:
                    self._calls[rank].insert(0, call)
                    self.kill(rank, str(death))
                    break
                except Exception as error:
                    call.reference.error = RayTaskError("measure_round", str(error), error)
                call.reference.due = call.ends

    def next_end(self) -> float:
        """Return when the next call ends."""
        return (
            math.inf if self._is_stuck() else min((calls[0].ends for calls in self._calls if calls), default=math.inf)
        )

    def _is_stuck(self) -> bool:
        """Whether nothing goes on: a rank is frozen, or the others wait for one that is lost."""
        return self.stopped or self.frozen < math.inf or self.is_lost or not self._nodes

    def kill(self, rank: int = 0, why: str = "the process died") -> None:
        """End the process of a rank. The other ranks wait for it."""
        self._lost.setdefault(rank, self.cluster.clock)
        self._fail(rank, why)

    def lose(self, node: Node) -> None:
        """End the processes on a node."""
        for rank, where in enumerate(self._nodes):
            if where is node:
                self.kill(rank)

    def freeze(self) -> None:
        """Stop all ranks where they are."""
        self.frozen = min(self.frozen, self.cluster.clock)

    def slow_down(self, factor: float) -> None:
        """Have everything take longer from now on."""
        clock = self.cluster.clock
        self.slowness = factor
        for calls in self._calls:
            for call in calls:
                call.ends = clock + (call.ends - clock) * factor

    def _fail(self, rank: int, why: str = "the process died") -> None:
        for call in self._calls[rank]:
            call.reference.due = self.cluster.clock
            call.reference.error = RayActorError(error_msg=why)
        self._calls[rank] = []

    def stop(self, *, hangs: bool = False) -> None:
        self.stopped = True
        self.killed_by_signal = hangs
        self._nodes = []
        for rank in range(len(self.names)):
            self._fail(rank)

    def signs(self) -> dict[str, Sign]:
        """Return what the ranks have reported."""
        if not self._nodes or not self.reports:
            return {}
        clock = self.cluster.clock
        working = any(self._calls) and not self._is_stuck()
        silent = min([self.frozen, *self._lost.values(), clock if working else self._worked])
        age = clock - min(self.frozen, clock)
        return {name: Sign(clock - silent, age, self.cluster.doing.get(name)) for name in self.names}


class SimulatedCluster:
    """Nodes, gangs and a clock.

    Attributes:
        on_open: called with a gang, a spec and a rank when a model has been opened; may raise.
        on_measure: called with a gang, an assignment and a rank; returns the result or raises.
        on_task: called with a gang, a task and a rank; returns the result or raises.
        on_wait: called whenever the scheduler waits.
        limit: gangs of a placement that may work at once.
        doing: activity that a rank reports, by its name.
        lost: error that `require_node` raises, if any.
        has_monitor: whether the monitor of heartbeats answers.
    """

    def __init__(self, nodes: int = 2, *, slots: int = 2, limit: int = 2) -> None:
        self.clock = 0.0
        self.limit = limit
        self.slots = slots
        self.gangs: list[SimulatedGang] = []
        self.dead_nodes: list[Node] = []
        self.alive: list[Node] = []
        self.on_open: Callable[[SimulatedGang, ReplicaSpec, int], None] = lambda gang, spec, rank: None
        self.on_measure: Callable[[SimulatedGang, Any, int], Any] = lambda gang, assignment, rank: result_of(assignment)
        self.on_task: Callable[[SimulatedGang, Any, int], Any] = lambda gang, task, rank: task(rank)
        self.on_wait: Callable[[], None] = lambda: None
        self.doing: dict[str, Doing] = {}
        self.told: dict[str, list[Any]] = {}
        self.lost: Exception | None = None
        self.has_monitor = True
        self._events: list[tuple[float, Callable[[], Any]]] = []
        self._spins = 0
        self._names = iter(range(1_000_000))
        for _ in range(nodes):
            self.add_node()

    def add_node(self) -> Node:
        node = Node(f"node{len(self.alive) + len(self.dead_nodes)}", self.slots)
        self.alive.append(node)
        return node

    def lose_node(self, node: Node) -> None:
        self.alive.remove(node)
        self.dead_nodes.append(node)
        for gang in self.working:
            gang.lose(node)

    def at(self, time: float, happens: Callable[[], Any]) -> None:
        """Have something happen at a time."""
        self._events.append((time, happens))

    @property
    def working(self) -> list[SimulatedGang]:
        """Gangs that were not stopped."""
        return [gang for gang in self.gangs if not gang.stopped]

    @property
    def placed(self) -> list[SimulatedGang]:
        """Gangs that have a place."""
        return [gang for gang in self.working if gang.is_placed]

    def new_gang(self, placement: Placement) -> SimulatedGang:
        self.gangs.append(SimulatedGang(self, f"g{next(self._names)}", placement))
        return self.gangs[-1]

    def replicas(self, placement: Placement) -> int:
        self._spins += 1
        assert self._spins < SPINS, "the scheduler spins without waiting"
        return self.limit

    def now(self) -> float:
        return self.clock

    def wait(self, references: Sequence[Reference], *, number: int, seconds: float) -> list[Reference]:
        self._spins = 0
        self.on_wait()
        deadline = self.clock + seconds
        while True:
            for event in [event for event in self._events if event[0] <= self.clock]:
                self._events.remove(event)
                event[1]()
            self._place()
            for gang in self.working:
                gang.advance(self.clock)
            ready = [reference for reference in references if reference.due <= self.clock]
            if ready or self.clock >= deadline:
                return ready[:number]
            ends = [gang.next_end() for gang in self.working]
            self.clock = min([deadline, *ends, *(time for time, _ in self._events)])

    def _place(self) -> None:
        """Give each gang that waits a place for all of its ranks, the oldest first."""
        free = {node: node.slots for node in self.alive if not node.draining}
        for gang in self.working:
            for node in gang._nodes:
                if node in free:
                    free[node] -= 1
        for gang in self.working:
            if not gang.is_placed:
                slots: list[Node] = []
                for node, number in free.items():
                    slots += [node] * number
                nodes = slots[: len(gang.names)]
                if len(nodes) == len(gang.names):
                    gang.place(nodes)
                    for node in nodes:
                        free[node] -= 1
        for node in [node for node in self.alive if node.draining]:
            if not any(node in gang._nodes for gang in self.working):
                self.lose_node(node)

    def get(self, reference: Reference) -> Any:
        if reference.error is not None:
            raise reference.error
        return reference.value

    def require_node(self) -> None:
        if self.lost is not None:
            raise self.lost

    def nodes(self) -> dict[str, dict[str, Any]]:
        return {node.name: {"Alive": node in self.alive} for node in [*self.alive, *self.dead_nodes]}

    def draining(self) -> Set[str]:
        return {node.name for node in self.alive if node.draining}

    def signs(self) -> dict[str, Sign] | None:
        if not self.has_monitor:
            return None
        signs: dict[str, Sign] = {}
        for gang in self.working:
            signs |= gang.signs()
        return signs

    def events(self, worker: str) -> list[Any]:
        return self.told.pop(worker, [])


@dataclass(eq=False)
class PlannedQueues:
    """Queues that are planned by given times. See `runs.ray.pool.QueueSource`."""

    cluster: SimulatedCluster
    queues: deque[UnitQueue[Any]]
    times: deque[float] = field(default_factory=deque)
    exhausted: bool = False

    def next(self, *, wait: bool) -> UnitQueue[Any] | None:
        if not self.queues:
            self.exhausted = True
            return None
        planned = self.times[0] if self.times else 0.0
        if planned > self.cluster.clock and not wait:
            return None
        self.cluster.clock = max(self.cluster.clock, planned)
        if self.times:
            self.times.popleft()
        return self.queues.popleft()
