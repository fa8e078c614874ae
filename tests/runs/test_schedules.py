"""Random schedules of a pool on a simulated cluster, and the laws that hold in each.

Gangs are killed, frozen and slowed down, and nodes are lost, drained and added, between any two waits of the pool:

1. Every unit's result counts exactly once.
2. No unit is lost: an unfinished unit is pending, or a gang has it.
3. No gang is idle while a unit that it can take is pending, and no place is left empty.
4. The merged bytes do not depend on the schedule.
5. The pool ends. A run fails only if a unit was harmed often enough.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable
from functools import reduce
from typing import Any

import pytest
from greenlet import getcurrent, greenlet
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test
from support.simulated_cluster import PlannedQueues, SimulatedCluster, SimulatedGang
from support.tiers import all_of
from support.units import SHARDS, shard_queue

from avss_dist.core.errors import AvssError
from avss_dist.runs.ray.pool import Pool
from avss_dist.runs.ray.queue import ATTEMPTS
from avss_dist.runs.work import Note
from avss_dist.stats.layer_stats import merge_moments

HANG_SECONDS = 20.0
WAITS = 3000  # of a pool that is no longer disturbed, after which it counts as endless
Moments = tuple[int, float, float]
MOMENTS: list[Moments] = [(3 + i, 0.1 * i, 1.0 / 3 + i) for i in range(len(SHARDS))]
PLACEMENTS: dict[str, dict[str, Any]] = {
    "single": {},
    "zero3": {"partition": "zero3", "ranks": 2},
    "tensor_parallel": {"partition": "tensor_parallel", "ranks": 2},
}


def merged(results: Iterable[tuple[int, Moments]]) -> bytes:
    """Return the merged moments of shards as bytes, merged in the order of their ids as a driver does."""
    in_order = [moments for _, moments in sorted(results)]
    return struct.pack("<qdd", *reduce(merge_moments, in_order))


class Schedules(RuleBasedStateMachine):
    """A pool that goes on, one wait after the other, between disturbances."""

    def __init__(self) -> None:
        super().__init__()
        self.cluster = SimulatedCluster(0)
        self.received: list[tuple[str, int, Any]] = []
        self.harms = 0
        self.has_ended = False

    @initialize(
        runs=st.lists(
            st.tuples(st.integers(1, 9), st.sampled_from([*PLACEMENTS]), st.sampled_from(["model", "other"])),
            min_size=1,
            max_size=3,
        ),
        nodes=st.integers(1, 4),
        limit=st.integers(1, 4),
        planned=st.sampled_from([0.0, 3.0]),
    )
    def begin(self, runs: list[tuple[int, str, str]], nodes: int, limit: int, planned: float) -> None:
        """Plan the runs. One that needs two ranks finds a place on any node."""
        self.cluster = SimulatedCluster(nodes, limit=limit)
        self.cluster.on_measure = measured
        self.numbers = {f"run{i}": number for i, (number, _, _) in enumerate(runs)}
        queues = []
        for i, (number, placement, model) in enumerate(runs):
            queue, _ = shard_queue(number, model, f"run{i}", **PLACEMENTS[placement])
            queues.append(queue)
        self.queues = queues
        self.pool = Pool(
            PlannedQueues(self.cluster, deque(queues), deque(planned * i for i in range(len(queues)))),  # type: ignore
            new_gang=self.cluster.new_gang,  # type: ignore[arg-type]
            replicas=self.cluster.replicas,
            minimum=1,
            cluster=self.cluster,  # type: ignore[arg-type]
            placement_seconds=1e9,
            hang_seconds=HANG_SECONDS,
            shortage=lambda placement: "",
        )
        disturber = getcurrent()

        def on_wait() -> None:
            self.check()
            disturber.switch()

        self.cluster.on_wait = on_wait
        self.running = greenlet(self.receive)
        self.running.switch()

    def receive(self) -> None:
        """Run the pool to its end, or to a law that does not hold."""
        for run, result in self.pool.outcomes():
            if isinstance(result, AvssError):
                self.received.append((run.run_id, -1, result))
            elif not isinstance(result, Note):
                self.received.append((run.run_id, *result))
        self.has_ended = True

    def check(self) -> None:
        """Check the laws that hold whenever the pool waits."""
        rounds = self.pool._rounds
        idle = {gang for gang, own in self.pool._gangs.items() if not own}
        for queue in self.pool._queues:
            held: set[int] = set()
            for round_ in rounds:
                if round_.queue is queue:
                    held |= set(round_.units)
            assert queue.unfinished <= held | {*queue.pending}, "a unit is lost"
            if not queue.pending:
                continue
            gangs = [g for g in self.pool._gangs if g.shape == queue.shape and not g.leaves]
            assert not idle.intersection(gangs), "a gang is idle while a unit is pending"
            opening = [r for r in rounds if r.gang in gangs and not r.units]
            room = len(gangs) < self.cluster.limit and len(opening) < queue.pending_rounds
            assert not room, "a place is left empty while a unit is pending"

    def step(self, number: int) -> None:
        for _ in range(number):
            if not self.running.dead:
                self.running.switch()

    def gang(self, choice: int) -> SimulatedGang | None:
        gangs = self.cluster.working
        return gangs[choice % len(gangs)] if gangs else None

    @rule(number=st.integers(1, 12))
    def go_on(self, number: int) -> None:
        self.step(number)

    @rule(choice=st.integers(0, 5), rank=st.integers(0, 1), number=st.integers(1, 6))
    def kill(self, choice: int, rank: int, number: int) -> None:
        gang = self.gang(choice)
        if gang and gang.is_placed:
            self.harms += 1
            gang.kill(rank % len(gang.names))
        self.step(number)

    @rule(choice=st.integers(0, 5), number=st.integers(1, 6))
    def freeze(self, choice: int, number: int) -> None:
        if gang := self.gang(choice):
            self.harms += 1
            gang.freeze()
        self.step(number)

    @rule(choice=st.integers(0, 5), factor=st.sampled_from([3.0, 30.0]), number=st.integers(1, 6))
    def slow_down(self, choice: int, factor: float, number: int) -> None:
        gang = self.gang(choice)
        if gang and gang.slowness == 1:
            gang.slow_down(factor)
        self.step(number)

    @rule(choice=st.integers(0, 5), drains=st.booleans(), number=st.integers(1, 6))
    def lose_node(self, choice: int, drains: bool, number: int) -> None:
        if nodes := self.cluster.alive:
            node = nodes[choice % len(nodes)]
            if drains:
                node.draining = True
            else:
                self.harms += 1
                self.cluster.lose_node(node)
        self.step(number)

    @rule(number=st.integers(1, 6))
    def add_node(self, number: int) -> None:
        self.cluster.add_node()
        self.step(number)

    def teardown(self) -> None:
        """Let the pool go on undisturbed, with enough nodes, and check what it has come to."""
        if not hasattr(self, "running") or (self.running.dead and not self.has_ended):
            return  # a step has shown what is wrong
        for _ in range(3):
            self.cluster.add_node()
        waits = 0
        while not self.running.dead:
            waits += 1
            assert waits < WAITS, "the pool does not end"
            self.step(1)
        self.pool.close()
        assert not self.cluster.working
        results = [(run, shard) for run, shard, _ in self.received]
        assert len(results) == len(set(results)), "a result counts twice"
        for run, number in self.numbers.items():
            shards = [(shard, moments) for source, shard, moments in self.received if source == run]
            if any(shard < 0 for shard, _ in shards):
                assert self.harms >= ATTEMPTS, "a run failed that was not harmed"
                continue
            assert sorted(shard for shard, _ in shards) == [*range(number)], "a unit has no result"
            expected = [(shard, MOMENTS[shard]) for shard in range(number)]
            assert merged(shards) == merged(expected), "the merged bytes depend on the schedule"


def measured(gang: SimulatedGang, assignment: Any, rank: int) -> Any:
    """Return a shard's id and its moments; None for a rank without a shard."""
    shard = assignment.shard
    return shard and (shard.shard_id, MOMENTS[shard.shard_id])


@pytest.mark.parametrize("first_seed", all_of(range(8), [0]))
def test_the_laws_hold_in_random_schedules(first_seed: int) -> None:
    """2,000 schedules in all; by default 250."""
    machine = seed(first_seed)(type("Seeded", (Schedules,), {}))
    chosen = settings(
        max_examples=250,
        stateful_step_count=12,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    run_state_machine_as_test(machine, settings=chosen)
