"""A pool on a simulated cluster: who is lost, hangs, dawdles or drains on the way, and what is measured again.

Random schedules are in `test_schedules`; a real cluster is in `test_ray`.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from support.simulated_cluster import Dies, PlannedQueues, SimulatedCluster, SimulatedGang, result_of
from support.units import cell_queue, shard_queue

from avss_dist.core.errors import AvssError, BatchTooLarge, ConfigError, ModelError, RunFailed
from avss_dist.executors.interface import RunShards
from avss_dist.executors.ray.cluster import START_SECONDS
from avss_dist.executors.ray.pool import Pool
from avss_dist.executors.ray.queue import ATTEMPTS, UnitQueue

HANG_SECONDS, PLACEMENT_SECONDS = 30.0, 60.0


def pool_of(cluster: SimulatedCluster, *queues: UnitQueue[Any], minimum: int = 1, planned: Any = ()) -> Pool:
    return Pool(
        PlannedQueues(cluster, deque(queues), deque(planned)),  # type: ignore[arg-type]
        new_gang=cluster.new_gang,  # type: ignore[arg-type]
        replicas=cluster.replicas,
        minimum=minimum,
        cluster=cluster,  # type: ignore[arg-type]
        placement_seconds=PLACEMENT_SECONDS,
        hang_seconds=HANG_SECONDS,
        shortage=lambda placement: "Nothing is free.",
    )


def outcomes(pool: Pool, after: dict[int, Callable[[], Any]] | None = None) -> list[tuple[Any, Any]]:
    """Run a pool to its end.

    Args:
        after: what happens after a number of outcomes.
    """
    received: list[tuple[Any, Any]] = []
    for outcome in pool.outcomes():
        received.append(outcome)
        (after or {}).get(len(received), lambda: None)()
    return received


def shard_ids(received: list[tuple[Any, Any]], run: RunShards | None = None) -> list[int]:
    """Return the ids of the shards whose results came, ascending."""
    assert not [result for _, result in received if isinstance(result, AvssError)]
    return sorted(shard.shard_id for source, shard in received if run in (None, source))


def times_measured(cluster: SimulatedCluster) -> Counter[int]:
    """Return how often each shard was measured to its end."""
    return Counter(
        assignment.shard.shard_id for gang in cluster.gangs for assignment in gang.measured if assignment.shard
    )


def failing(unit: int, *errors: Exception) -> Callable[[SimulatedGang, Any, int], Any]:
    """Return an `on_measure` that raises one error after the other at a shard or cell, and the last one always.

    A None at the end lets the unit pass from then on.
    """
    pending = deque(errors)

    def measure(gang: SimulatedGang, assignment: Any, rank: int) -> Any:
        result = result_of(assignment)
        if result is not None and getattr(result, "part", getattr(result, "shard_id", None)) == unit:
            error = pending[0] if len(pending) == 1 else pending.popleft()
            if error is not None:
                raise error
        return result

    return measure


def failing_to_open(
    error: Exception, where: Callable[[SimulatedGang, Any], bool] = lambda *_: True
) -> Callable[[SimulatedGang, Any, int], None]:
    """Return an `on_open` that raises an error for some gangs and specs."""

    def opened(gang: SimulatedGang, spec: Any, rank: int) -> None:
        if where(gang, spec):
            raise error

    return opened


def test_gangs_share_the_shards_and_each_counts_once() -> None:
    cluster = SimulatedCluster(limit=3)
    queue, _ = shard_queue(20)
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(20)]
    assert set(times_measured(cluster).values()) == {1} and len(cluster.gangs) == 3
    assert all(gang.measured for gang in cluster.gangs)
    assert cluster.clock < 1 + 20 / 3 + 3, "none of them was idle"


@pytest.mark.parametrize("what", ["worker", "node"])
def test_a_lost_gang_is_replaced_and_its_shards_are_measured_again(what: str) -> None:
    """A line of the run's notes says what was lost."""
    cluster = SimulatedCluster(2, slots=1)
    queue, run = shard_queue(10)

    def lose() -> None:
        cluster.gangs[0].kill() if what == "worker" else cluster.lose_node(cluster.alive[0])
        cluster.add_node()

    assert shard_ids(outcomes(pool_of(cluster, queue), {3: lose})) == [*range(10)]
    assert len(cluster.gangs) == 3 and cluster.gangs[2].measured
    lost = "a worker on the node (node0) was lost" if what == "worker" else "the node (node0) was lost"
    (note,) = run.notes
    assert re.fullmatch(rf"{re.escape(lost)}; shards? [\d, ]+ (is|are) measured again", note)


@pytest.mark.parametrize("reports", [True, False])
def test_a_frozen_gang_is_killed_by_a_signal_and_replaced(reports: bool) -> None:
    """One that never reported may be starting, which takes longer."""
    cluster = SimulatedCluster(limit=1)
    queue, _ = shard_queue(4)
    new_gang = cluster.new_gang

    def first_one_is_frozen(placement: Any) -> SimulatedGang:
        gang = new_gang(placement)
        if len(cluster.gangs) == 1:
            gang.reports = False
            gang.freeze()
        return gang

    pool = pool_of(cluster, queue)
    if not reports:
        pool._new_gang = first_one_is_frozen  # type: ignore[assignment]
    received = outcomes(pool, {2: lambda: cluster.gangs[0].freeze()} if reports else None)
    assert shard_ids(received) == [*range(4)]
    assert cluster.gangs[0].killed_by_signal and len(cluster.gangs) == 2
    patience = HANG_SECONDS if reports else START_SECONDS
    assert patience < cluster.clock < patience + 20


@pytest.mark.parametrize("has_monitor", [True, False])
def test_a_slow_gang_that_makes_progress_is_not_stopped(has_monitor: bool) -> None:
    """Nor is any gang while the monitor is lost."""
    cluster = SimulatedCluster(limit=1)
    cluster.has_monitor = has_monitor
    queue, _ = shard_queue(3)
    received = outcomes(pool_of(cluster, queue), {1: lambda: cluster.gangs[0].slow_down(100)})
    assert shard_ids(received) == [*range(3)] and len(cluster.gangs) == 1
    assert cluster.clock > 3 * HANG_SECONDS


@pytest.mark.parametrize(
    ("error", "words"), [(Dies("the process died"), "the process died"), (OSError("no disk"), "OSError: no disk")]
)
def test_a_shard_that_fails_again_and_again_fails_its_run_alone(error: Exception, words: str) -> None:
    cluster = SimulatedCluster(limit=1)
    (bad, bad_run), (good, good_run) = shard_queue(5, run_id="bad"), shard_queue(5, "other", run_id="good")
    measure = failing(2, error)
    cluster.on_measure = lambda gang, assignment, rank: (
        measure(gang, assignment, rank) if gang.spec == bad.spec else result_of(assignment)
    )
    received = outcomes(pool_of(cluster, bad, good))
    (failure,) = [result for _, result in received if isinstance(result, RunFailed)]
    assert f"Shard 2 failed {ATTEMPTS} times; the last time: {words}" in str(failure)
    assert [source.run_id for source, result in received if result is failure] == ["bad"]
    assert shard_ids([o for o in received if o[1] is not failure], good_run) == [*range(5)]
    assert len([o for o in received if o[0] is bad_run]) == 3, "two shards, and the failure"


def test_a_gang_that_dies_with_a_round_in_advance_blames_none_of_its_shards() -> None:
    """They are measured one by one then, which shows the one that kills."""
    cluster = SimulatedCluster(limit=1)
    queue, _ = shard_queue(20)
    cluster.on_measure = failing(3, Dies("the process died"))
    assert "Shard 3 failed" in str(outcomes(pool_of(cluster, queue))[-1][1])
    assert len(cluster.gangs) == 1 + ATTEMPTS


@pytest.mark.parametrize("error", [Dies("the process died"), OSError("a passing fault")])
def test_passing_faults_are_retried(error: Exception) -> None:
    cluster = SimulatedCluster(limit=2)
    queue, _ = shard_queue(8)
    cluster.on_measure = failing(2, *[error] * (ATTEMPTS - 1), None)  # type: ignore[arg-type]
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(8)]


def test_a_cell_that_kills_its_workers_fails_alone() -> None:
    cluster = SimulatedCluster(limit=1)
    queue, cells = cell_queue(["loss"] * 4)
    cluster.on_measure = failing(2, Dies("the process died"))
    received = dict(outcomes(pool_of(cluster, queue)))
    assert f"Part 2 of loss failed {ATTEMPTS} times" in str(received.pop(cells[2]))
    assert received == {cell: cell for cell in cells if cell.part != 2}


@pytest.mark.parametrize(("partition", "ranks"), [("single", 1), ("zero3", 2)])
def test_an_error_of_a_unit_ends_what_it_belongs_to(partition: str, ranks: int) -> None:
    """A run, or a cell alone. A gang of one rank goes on with its model; of several, others may wait for the one."""
    error = ModelError("There is no layer 99.")
    cluster = SimulatedCluster(limit=1)
    cluster.on_measure = failing(1, error)
    runs, run = shard_queue(6, partition=partition, ranks=ranks)
    queue, cells = cell_queue(["loss"] * 3, partition=partition, ranks=ranks)
    assert (run, error) in outcomes(pool_of(cluster, runs))
    assert all(gang.stopped for gang in cluster.gangs) == (ranks > 1)
    cluster.gangs.clear()
    received = dict(outcomes(pool_of(cluster, queue)))
    assert received == {cells[0]: cells[0], cells[1]: error, cells[2]: cells[2]}
    assert len(cluster.gangs) == ranks
    assert cluster.gangs[0].opened == [queue.spec]


def test_batches_are_halved_until_they_fit() -> None:
    """For all gangs: four rows, two, one."""
    cluster = SimulatedCluster(limit=2)
    queue, _ = shard_queue(6)

    def one_row_fits(gang: SimulatedGang, assignment: Any, rank: int) -> Any:
        if assignment.rows > 1:
            raise BatchTooLarge(f"{assignment.rows} rows do not fit in memory")
        return result_of(assignment)

    cluster.on_measure = one_row_fits
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(6)]
    assert {assignment.rows for gang in cluster.gangs for assignment in gang.measured} == {1} and queue.rows == 1
    queue, run = shard_queue(6)
    error = BatchTooLarge("not even one row fits")
    cluster.on_measure = failing(0, error)
    assert (run, error) in outcomes(pool_of(cluster, queue)) and queue.rows == 1


def test_a_model_that_cannot_be_opened_fails_its_runs_and_the_gang_opens_the_next() -> None:
    cluster = SimulatedCluster(limit=1)
    (bad, bad_run), (good, good_run) = shard_queue(3, "bad"), shard_queue(3, "good")
    error = ModelError("no such model")
    cluster.on_open = failing_to_open(error, lambda gang, spec: spec == bad.spec)
    received = outcomes(pool_of(cluster, bad, good))
    assert received[0] == (bad_run, error)
    assert shard_ids(received[1:], good_run) == [*range(3)]
    (gang,) = cluster.gangs
    assert gang.opened == [bad.spec, good.spec]


@pytest.mark.parametrize("error", [Dies("out of memory"), OSError("out of memory")])
def test_opening_a_model_is_tried_some_times(error: Exception) -> None:
    cluster = SimulatedCluster(limit=1)
    queue, run = shard_queue(3)
    cluster.on_open = failing_to_open(error)
    ((source, failure),) = outcomes(pool_of(cluster, queue))
    assert source is run and f"Opening the model failed {ATTEMPTS} times; the last time: " in str(failure)
    assert "out of memory" in str(failure) and len(cluster.gangs) == ATTEMPTS


def test_a_node_on_which_no_model_can_be_opened_ends_no_run_while_others_have_it_open() -> None:
    cluster = SimulatedCluster(2, slots=1)
    queue, _ = shard_queue(30)
    cluster.on_open = failing_to_open(Dies("no device there"), lambda gang, _: "node0" in gang.nodes)
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(30)]
    assert len([gang for gang in cluster.gangs if gang.is_lost]) > ATTEMPTS


def test_nodes_that_are_lost_while_they_open_a_model_are_no_fault_of_the_model() -> None:
    cluster = SimulatedCluster(5, slots=1, limit=5)
    queue, _ = shard_queue(20)

    for node in cluster.alive[:4]:
        cluster.at(0.5, partial(cluster.lose_node, node))
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(20)]
    assert len(cluster.alive) == 1


def test_workers_without_the_package_are_a_mistake_of_the_user() -> None:
    cluster = SimulatedCluster(limit=1)
    queue, run = shard_queue(3)
    cluster.on_open = failing_to_open(Dies("ModuleNotFoundError: No module named 'avss_dist'"))
    ((source, error),) = outcomes(pool_of(cluster, queue))
    assert source is run and isinstance(error, ConfigError) and "cannot import avss_dist" in str(error)


def test_a_draining_node_finishes_its_rounds_and_takes_no_other() -> None:
    """Each shard is measured once, and the monitor leaves the node, too."""
    cluster = SimulatedCluster(3, slots=1, limit=2)
    queue, _ = shard_queue(20)
    measured_then: list[int] = []

    def drain() -> None:
        cluster.alive[0].draining = True
        measured_then.append(len(cluster.gangs[0].measured))

    assert shard_ids(outcomes(pool_of(cluster, queue), {4: drain})) == [*range(20)]
    assert set(times_measured(cluster).values()) == {1}
    leaving = cluster.gangs[0]
    assert leaving.stopped and leaving.leaves and len(leaving.measured) <= measured_then[0] + 5
    assert {"node0"} in cluster.left and len(cluster.gangs) == 3
    assert "node0" in {node.name for node in cluster.dead_nodes}, "nothing holds it"


@pytest.mark.parametrize("state", ["idle", "opening"])
def test_a_draining_node_with_nothing_to_finish_is_left_at_once(state: str) -> None:
    """While the other gang measures on."""
    cluster = SimulatedCluster(3, limit=2)
    queue, _ = shard_queue(4, partition="zero3", ranks=2)  # gangs repeat no late shards of each other
    cluster.at(1.5, lambda: cluster.gangs[1].slow_down(60))

    def drain() -> None:
        assert (not cluster.gangs[0].measured) == (state == "opening")
        cluster.alive[0].draining = True
        if state == "opening":
            cluster.gangs[0].slow_down(1000)

    cluster.at(0.5 if state == "opening" else 10.0, drain)
    left: list[float] = []
    cluster.on_wait = lambda: left.append(cluster.clock) if cluster.dead_nodes else None
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(4)]
    assert left[0] < (6 if state == "opening" else 16)


def test_an_idle_gang_repeats_late_shards_and_the_first_result_counts() -> None:
    cluster = SimulatedCluster(limit=2)
    queue, _ = shard_queue(12)
    received = outcomes(pool_of(cluster, queue), {6: lambda: cluster.gangs[0].slow_down(1000)})
    assert shard_ids(received) == [*range(12)]
    assert cluster.clock < 100, "nobody waits for the slow one"


def test_a_run_begins_when_as_many_gangs_are_placed_as_it_waits_for() -> None:
    """Models are opened meanwhile."""
    cluster = SimulatedCluster(1, limit=5)
    queue, _ = shard_queue(20)

    def grow() -> None:
        if cluster.clock >= 20 and len(cluster.alive) == 1:
            assert [gang.opened for gang in cluster.placed] == [[queue.spec]] * 2
            assert not times_measured(cluster) and len(cluster.working) == 5
            cluster.add_node()

    cluster.on_wait = grow
    assert shard_ids(outcomes(pool_of(cluster, queue, minimum=4))) == [*range(20)]
    assert len([gang for gang in cluster.gangs if gang.measured]) == 4


def test_a_run_of_few_shards_waits_for_no_more_gangs_than_it_has_shards() -> None:
    cluster = SimulatedCluster(1, limit=5)
    queue, _ = shard_queue(2)
    assert shard_ids(outcomes(pool_of(cluster, queue, minimum=4))) == [0, 1]


@pytest.mark.parametrize(
    ("nodes", "minimum", "words"),
    [(0, 1, "No worker was placed in 60 seconds"), (1, 4, "Only 2 of 4 replicas were placed in 60 seconds")],
)
def test_a_place_is_waited_for_no_longer_than_said(nodes: int, minimum: int, words: str) -> None:
    cluster = SimulatedCluster(nodes, limit=5)
    queue, run = shard_queue(20)
    ((source, error),) = outcomes(pool_of(cluster, queue, minimum=minimum))
    assert source is run and isinstance(error, RunFailed) and f"{words}. Nothing is free." in str(error)
    assert PLACEMENT_SECONDS < cluster.clock < PLACEMENT_SECONDS + 10
    assert not [gang for gang in cluster.working if not gang.is_placed]


def test_gangs_without_a_place_wait_while_others_work_and_go_when_no_shard_is_left_for_them() -> None:
    """An autoscaler sees them, and adds no node for nothing."""
    cluster = SimulatedCluster(1, limit=6)
    queue, _ = shard_queue(12)
    waiting: list[tuple[int, int]] = []

    def note() -> None:
        if cluster.clock:
            waiting.append((len(queue.unfinished), len(cluster.working) - len(cluster.placed)))

    cluster.on_wait = note
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(12)]
    assert max(number for _, number in waiting) == 4
    assert {number for unfinished, number in waiting if 0 < unfinished <= 2} == {0}
    assert cluster.clock < PLACEMENT_SECONDS


def test_models_share_the_gangs_and_other_shapes_get_their_resources() -> None:
    """Two models of one rank, then one of two ranks, which needs the places of both."""
    cluster = SimulatedCluster(1, limit=2)
    queues = [
        shard_queue(4, "first")[0],
        shard_queue(4, "second")[0],
        shard_queue(4, "third", partition="zero3", ranks=2)[0],
    ]
    assert len(outcomes(pool_of(cluster, *queues))) == 12
    singles = [gang for gang in cluster.gangs if len(gang.names) == 1]
    assert len(singles) == 2 and all(gang.stopped for gang in singles)
    assert {len(gang.opened) for gang in singles} == {2}
    assert next(gang.opened for gang in cluster.gangs if len(gang.names) == 2) == [queues[2].spec]


def test_the_next_queue_may_take_its_time() -> None:
    """Gangs that are idle meanwhile stay, and open its model at once."""
    cluster = SimulatedCluster(limit=2)
    (first, _), (second, _) = shard_queue(3), shard_queue(3, "other")
    assert len(outcomes(pool_of(cluster, first, second, planned=(0.0, 500.0)))) == 6
    assert 500 < cluster.clock < 510 and len(cluster.gangs) == 2


def test_a_dropped_run_ends_and_the_next_one_goes_on() -> None:
    cluster = SimulatedCluster(limit=2)
    (first, run), (second, other) = shard_queue(30), shard_queue(3, "other")
    received = outcomes(pool_of(cluster, first, second), {3: lambda: setattr(run, "dropped", True)})
    assert shard_ids(received, other) == [*range(3)]
    assert len(shard_ids(received, run)) < 12


def test_progress_of_cells_is_passed_on() -> None:
    cluster = SimulatedCluster(limit=1)
    heard: list[Any] = []
    queue, cells = cell_queue(["loss"] * 2, underway=lambda *what: heard.append(what))
    cluster.doing["g0.0"] = ("Reading", 0.5)
    cluster.on_wait = lambda: cluster.gangs[0].slow_down(40) if cluster.clock == 1 else None
    outcomes(pool_of(cluster, queue))
    assert (cells[0], "Reading", 0.5) in heard


@pytest.mark.parametrize("when", ["while it waits", "at a lost result"])
def test_a_lost_cluster_ends_the_pool(when: str) -> None:
    cluster = SimulatedCluster(limit=1)
    queue, _ = shard_queue(20)
    pool = pool_of(cluster, queue)

    def lose() -> None:
        cluster.lost = RunFailed("The Ray cluster is lost.", "Start it again.")
        if when == "at a lost result":
            cluster.gangs[0].kill()

    with pytest.raises(RunFailed, match="The Ray cluster is lost"):
        outcomes(pool, {2: lose})
    pool.close()
    assert not cluster.working


def test_a_round_ends_before_its_first_failing_shard() -> None:
    """Short shards share a round: those after the failing one are measured later, and it alone fails."""
    cluster = SimulatedCluster(limit=1)
    queue, _ = shard_queue(60)
    queue.note_duration([0], 0.01)
    cluster.on_measure = failing(5, *[OSError("a passing fault")] * 2, None)  # type: ignore[arg-type]
    assert shard_ids(outcomes(pool_of(cluster, queue))) == [*range(60)]
    assert len(cluster.gangs) == 2 and set(times_measured(cluster).values()) == {1}
