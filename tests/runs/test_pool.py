"""A pool on a simulated cluster: who is lost, hangs, dawdles or drains on the way, and what is measured again.

And its parts: queues of units, tasks of several ranks, and the monitor. Random schedules are in `test_schedules`; a
real cluster is in `test_ray`.
"""

from __future__ import annotations

import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from huggingface_hub import constants
from support.devices import devices_of
from support.simulated_cluster import Dies, PlannedQueues, SimulatedCluster, SimulatedGang, result_of
from support.units import SETTINGS, cell_queue, shard_queue
from torch.distributed import DistNetworkError

from avss_dist.core.errors import AvssError, BatchTooLarge, ConfigError, ModelError, RunFailed
from avss_dist.core.intervention import EncodedPatch
from avss_dist.core.settings import Settings
from avss_dist.models.checkpoint.locate import Checkpoint
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.cluster import START_SECONDS, Watch, late
from avss_dist.runs.ray.executor import RayExecutor, run_together
from avss_dist.runs.ray.heartbeats import HeartbeatMonitor
from avss_dist.runs.ray.pool import Pool
from avss_dist.runs.ray.queue import ATTEMPTS, LATE_SECONDS, ShardQueue, UnitQueue
from avss_dist.runs.ray.worker import resolve_on_node
from avss_dist.runs.work import Note, RunShards

HANG_SECONDS = 30.0
PLACEMENT_SECONDS = 60.0


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


def outcomes(
    pool: Pool, after: dict[int, Callable[[], Any]] | None = None, notes: list[tuple[Any, str]] | None = None
) -> list[tuple[Any, Any]]:
    """Run a pool to its end, and return its outcomes but for notes.

    Args:
        after: what happens after a number of outcomes.
        notes: receives each note with its run.
    """
    received: list[tuple[Any, Any]] = []
    for source, outcome in pool.outcomes():
        if isinstance(outcome, Note):
            if notes is not None:
                notes.append((source, outcome.text))
            continue
        received.append((source, outcome))
        (after or {}).get(len(received), lambda: None)()
    return received


def with_messages(received: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Return outcomes with the messages of errors in their place: each outcome has an error of its own."""
    return [(source, getattr(outcome, "message", outcome)) for source, outcome in received]


def shard_ids(received: list[tuple[Any, Any]], run: RunShards | None = None) -> list[int]:
    """Return the ids of the shards whose results came, ascending."""
    assert not [result for _, result in received if isinstance(result, AvssError)]
    return sorted(shard.shard_id for source, shard in received if run in (None, source))


def times_measured(cluster: SimulatedCluster) -> Counter[int]:
    """Return how often each shard was measured to its end."""
    times: Counter[int] = Counter()
    for gang in cluster.gangs:
        times.update(assignment.shard.shard_id for assignment in gang.measured if assignment.shard)
    return times


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
    assert set(times_measured(cluster).values()) == {1}
    assert len(cluster.gangs) == 3
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

    notes: list[tuple[Any, str]] = []
    assert shard_ids(outcomes(pool_of(cluster, queue), {3: lose}, notes)) == [*range(10)]
    assert len(cluster.gangs) == 3
    assert cluster.gangs[2].measured
    lost = "a worker on the node (node0) was lost" if what == "worker" else "the node (node0) was lost"
    ((noted, note),) = notes
    assert noted is run
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
    assert cluster.gangs[0].killed_by_signal
    assert len(cluster.gangs) == 2
    patience = HANG_SECONDS if reports else START_SECONDS
    assert patience < cluster.clock < patience + 20


@pytest.mark.parametrize("has_monitor", [True, False])
def test_a_slow_gang_that_makes_progress_is_not_stopped(has_monitor: bool) -> None:
    """Nor is any gang while the monitor is lost."""
    cluster = SimulatedCluster(limit=1)
    cluster.has_monitor = has_monitor
    queue, _ = shard_queue(3)
    received = outcomes(pool_of(cluster, queue), {1: lambda: cluster.gangs[0].slow_down(100)})
    assert shard_ids(received) == [*range(3)]
    assert len(cluster.gangs) == 1
    assert cluster.clock > 3 * HANG_SECONDS


@pytest.mark.parametrize(
    ("error", "words"), [(Dies("the process died"), "the process died"), (OSError("no disk"), "OSError: no disk")]
)
def test_a_shard_that_fails_again_and_again_fails_its_run_alone(error: Exception, words: str) -> None:
    cluster = SimulatedCluster(limit=1)
    bad, bad_run = shard_queue(5, run_id="bad")
    good, good_run = shard_queue(5, "other", run_id="good")
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
    assert (run, error.message) in with_messages(outcomes(pool_of(cluster, runs)))
    assert all(gang.stopped for gang in cluster.gangs) == (ranks > 1)
    cluster.gangs.clear()
    received = dict(with_messages(outcomes(pool_of(cluster, queue))))
    assert received == {cells[0]: cells[0], cells[1]: error.message, cells[2]: cells[2]}
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
    rows_of_assignments: set[int] = set()
    for gang in cluster.gangs:
        rows_of_assignments |= {assignment.rows for assignment in gang.measured}
    assert rows_of_assignments == {1}
    assert queue.rows == 1
    queue, run = shard_queue(6)
    error = BatchTooLarge("not even one row fits")
    cluster.on_measure = failing(0, error)
    assert (run, error.message) in with_messages(outcomes(pool_of(cluster, queue)))
    assert queue.rows == 1


def test_a_model_that_cannot_be_opened_fails_its_runs_and_the_gang_opens_the_next() -> None:
    cluster = SimulatedCluster(limit=1)
    bad, bad_run = shard_queue(3, "bad")
    good, good_run = shard_queue(3, "good")
    error = ModelError("no such model")
    cluster.on_open = failing_to_open(error, lambda gang, spec: spec == bad.spec)
    received = outcomes(pool_of(cluster, bad, good))
    assert with_messages(received)[0] == (bad_run, error.message)
    assert shard_ids(received[1:], good_run) == [*range(3)]
    (gang,) = cluster.gangs
    assert gang.opened == [bad.spec, good.spec]


@pytest.mark.parametrize("error", [Dies("out of memory"), OSError("out of memory")])
def test_opening_a_model_is_tried_some_times(error: Exception) -> None:
    cluster = SimulatedCluster(limit=1)
    queue, run = shard_queue(3)
    cluster.on_open = failing_to_open(error)
    ((source, failure),) = outcomes(pool_of(cluster, queue))
    assert source is run
    assert f"Opening the model failed {ATTEMPTS} times; the last time: " in str(failure)
    assert "out of memory" in str(failure)
    assert len(cluster.gangs) == ATTEMPTS


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
    assert source is run
    assert isinstance(error, ConfigError)
    assert "cannot import avss_dist" in str(error)


def test_a_draining_node_finishes_its_rounds_and_takes_no_other() -> None:
    """Each shard is measured once."""
    cluster = SimulatedCluster(3, slots=1, limit=2)
    queue, _ = shard_queue(20)
    measured_then: list[int] = []

    def drain() -> None:
        cluster.alive[0].draining = True
        measured_then.append(len(cluster.gangs[0].measured))

    assert shard_ids(outcomes(pool_of(cluster, queue), {4: drain})) == [*range(20)]
    assert set(times_measured(cluster).values()) == {1}
    leaving = cluster.gangs[0]
    assert leaving.stopped
    assert leaving.leaves
    assert len(leaving.measured) <= measured_then[0] + 5
    assert len(cluster.gangs) == 3
    assert "node0" in {node.name for node in cluster.dead_nodes}, "nothing holds it"


@pytest.mark.parametrize("state", ["idle", "opening"])
def test_a_draining_node_with_nothing_to_finish_is_left_at_once(state: str) -> None:
    """While the other gang measures on."""
    cluster = SimulatedCluster(3, limit=2)
    queue, _ = shard_queue(4, partition="zero3", ranks=2)
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
            assert not times_measured(cluster)
            assert len(cluster.working) == 5
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
    assert source is run
    assert isinstance(error, RunFailed)
    assert f"{words}. Nothing is free." in str(error)
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
    assert len(singles) == 2
    assert all(gang.stopped for gang in singles)
    assert {len(gang.opened) for gang in singles} == {2}
    assert next(gang.opened for gang in cluster.gangs if len(gang.names) == 2) == [queues[2].spec]


def test_the_next_queue_may_take_its_time() -> None:
    """Gangs that are idle meanwhile stay, and open its model at once."""
    cluster = SimulatedCluster(limit=2)
    first, _ = shard_queue(3)
    second, _ = shard_queue(3, "other")
    assert len(outcomes(pool_of(cluster, first, second, planned=(0.0, 500.0)))) == 6
    assert 500 < cluster.clock < 510
    assert len(cluster.gangs) == 2


def test_a_dropped_run_ends_and_the_next_one_goes_on() -> None:
    cluster = SimulatedCluster(limit=2)
    first, run = shard_queue(30)
    second, other = shard_queue(3, "other")
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
    assert len(cluster.gangs) == 2
    assert set(times_measured(cluster).values()) == {1}


@pytest.fixture(autouse=True)
def no_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """References are what would be put there."""
    for name in ("put", "get"):
        monkeypatch.setattr(ray, name, lambda value: value)


def assignments(queue: ShardQueue, units: Sequence[int]) -> list[Any]:
    """What the workers of a gang do in a round, one after the other."""
    round_assignments: list[Any] = []
    for part in queue.parts(units):
        round_assignments += part
    return round_assignments


def patch_of(key: str) -> EncodedPatch:
    return EncodedPatch(key, key.encode)


def test_a_result_counts_once() -> None:
    queue, run = shard_queue(2)
    (first,) = queue.next_units()
    queue.note_duration([1], 1.0)
    assert queue.repeat_late([first], 3.0)
    assert list(queue.pending) == [0, 1]
    assert queue.finish(first, "a result") == [(run, "a result")]
    assert list(queue.pending) == [1], "who is late need not begin any more"
    assert queue.finish(first, "the same result") == []
    assert queue.unfinished == {1}


def test_a_result_costs_the_same_however_many_units_are_pending() -> None:
    queue, _ = shard_queue(3)
    pending = queue.pending
    queue.finish(*queue.next_units(), "a result")
    assert queue.pending is pending, "it was built anew"
    assert list(pending) == [1, 2]


def test_every_cell_of_a_model_that_fails_has_an_error_of_its_own() -> None:
    queue, _ = cell_queue(["loss"] * 2)
    (_, first), (_, second) = queue.fail([], ModelError("no such model"))
    first.add_note("a note")
    assert not hasattr(second, "__notes__")


def test_a_cell_fails_alone_and_a_model_with_all_of_its_cells() -> None:
    queue, cells = cell_queue(["loss"] * 4)
    error = ModelError("no such layer")
    ((cell, failure),) = queue.fail(queue.next_units(), error)
    assert cell == cells[0]
    assert failure.message == "no such layer"
    queue.finish(2, "a result")
    for _ in range(ATTEMPTS - 1):
        assert queue.put_back([], "out of reach") == []
    outcomes = queue.put_back([], "out of reach")
    assert [cell for cell, _ in outcomes] == [cells[1], cells[3]]
    assert all("Opening the model failed" in str(failure) for _, failure in outcomes)
    assert not queue.is_active


def test_gangs_that_open_a_model_at_once_fail_at_once() -> None:
    """Half of the nodes may be lost while all of them open it; what counts is how often one after the other failed."""
    queue, run = shard_queue(3)
    together = time.monotonic()
    for _ in range(5):
        assert queue.put_back([], "its node was lost", together) == []
    assert queue.put_back([], "again", time.monotonic()) == []
    queue.note_opened()
    for _ in range(ATTEMPTS - 1):
        assert queue.put_back([], "it died", time.monotonic()) == [], "it can be opened: what was before counts no more"
    assert queue.put_back([], None) == [], "no failure of the model"
    ((source, error),) = queue.put_back([], "it died", time.monotonic())
    assert source is run
    assert "Opening the model failed 3 times; the last time: it died" in str(error)


def test_a_unit_that_fails_is_no_model_that_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it hide failures to open the model that began before it; those that began at a failure are new ones."""
    queue, _ = shard_queue(3)
    queue.clock = lambda: 10.0
    assert queue.put_back(queue.next_units(), "it died") == []
    for begun in (5.0, 10.0):
        assert queue.put_back([], "out of reach", begun) == []
    assert queue.put_back([], "its node was lost", 9.0) == [], "it was being opened at the first failure"
    (outcome,) = queue.put_back([], "out of reach", 10.0)
    assert "Opening the model failed 3 times" in str(outcome[1])


def test_what_was_measured_meanwhile_is_not_put_back() -> None:
    queue, _ = shard_queue(4)
    queue.note_duration([0], 0.01)
    assert queue.next_units() == [0]
    assert queue.next_units() == [1]
    queue.finish(0, "a result")
    assert queue.put_back([0, 1], None) == []
    assert list(queue.pending) == [1, 2, 3]
    assert queue.unfinished == {1, 2, 3}
    assert shard_queue(1)[0].next_units() == [0]


def test_every_rank_takes_the_cell_with_its_patch() -> None:
    queue, cells = cell_queue(["loss"], partition="tensor_parallel", ranks=2)
    parts = assignments(queue, [0])
    assert len(parts) == 2
    for part in parts:
        assert part.cell == cells[0]
        assert part.rows == SETTINGS.batch_size
    queue, cells = cell_queue(["loss", "loss"], patch_of("k"))
    ((assignment,),) = queue.parts([1])
    assert assignment.cell.part == 1
    assert assignment.cell.intervention.patch.read() == b"k"
    assert cells[1].intervention.patch == patch_of("k")


def test_ranks_that_take_different_shards_are_never_late() -> None:
    """Nobody measures their shards beside them."""
    queue, _ = shard_queue(9, partition="zero3", ranks=2)
    queue.note_duration(queue.next_units(), 3.0)
    assert not queue.repeat_late(queue.next_units(), 1e9)


def test_gangs_of_ranks_that_share_shards_take_one_after_the_other() -> None:
    queue, _ = shard_queue(100, partition="tensor_parallel", ranks=2)
    queue.note_duration(queue.next_units(), 0.01)
    assert queue.next_units() == [1]
    assert [part.forwards for part in assignments(queue, [4])] == [2, 2]  # 5 rows, 4 in a batch
    assert [part.forwards for part in assignments(shard_queue()[0], [4])] == [0], "it waits for nobody"


def test_only_units_of_one_kind_say_what_is_late() -> None:
    queue, _ = cell_queue(["loss", "loss", "shapley"])
    assert not queue.repeat_late([1], 1e9), "nothing to compare it with"
    queue.note_duration([0], 1.0)
    assert not queue.repeat_late([1], LATE_SECONDS)
    assert not queue.repeat_late([2], 1e9), "of another task"
    assert not queue.repeat_late([], 1e9), "a model that is being opened"
    assert queue.repeat_late([1], 3.0)
    assert not queue.repeat_late([1], 1e9), "no third time"


def test_a_round_is_late_after_twice_the_time_of_its_units() -> None:
    queue, _ = shard_queue(9)
    queue.note_duration([0, 1, 2], 1.5)
    assert not queue.repeat_late([4, 5, 6], 2.9)
    assert queue.repeat_late([4, 5, 6], 3.1)


def test_ranks_share_a_shard_or_take_one_each() -> None:
    """ZeRO-3 ranks take different shards, and run equal numbers of forward passes; tensor-parallel ones share."""
    queue, run = shard_queue(5, partition="zero3", ranks=3)
    assert queue.pending_rounds == 2
    queue.next_units()
    last = queue.next_units()
    assert last == [3, 4]
    assert queue.by_rank(last) == [[3], [4], []]
    parts = assignments(queue, last)
    assert [part.shard for part in parts] == [run.shards[3], run.shards[4], None]
    assert {part.forwards for part in parts} == {2}  # 5 rows, 4 in a batch
    queue, run = shard_queue(2, partition="tensor_parallel", ranks=2)
    assert queue.by_rank(queue.next_units()) == [[0], [0]]
    assert [part.shard for part in assignments(queue, [1])] == [run.shards[1]] * 2


def test_a_gang_has_its_next_round_beforehand_while_there_are_enough() -> None:
    queue, _ = shard_queue(5)
    queue.next_units()
    assert queue.runs_ahead(3), "others would have none"
    assert not queue.runs_ahead(4), "others would have none"
    queue.put_back([0], None)
    assert not queue.runs_ahead(3), "what is measured again is measured alone"
    queue.finish(*queue.next_units(), "a result")
    assert queue.runs_ahead(3)
    assert not shard_queue(5, partition="zero3", ranks=2)[0].runs_ahead(1), "ranks keep one order"
    assert not cell_queue(["loss"] * 5)[0].runs_ahead(1), "cells take very different times"


def test_short_shards_share_a_round_until_one_of_them_fails() -> None:
    """As many as take a second, and a sixteenth of a gang's part of what is left; who may be to blame goes alone."""
    queue, run = shard_queue(100)
    assert queue.next_units(2) == [0], "how long they take is not known"
    queue.note_duration([0], 0.01)
    assert queue.next_units(2) == [1, 2, 3]
    assert [part.shard for part in assignments(queue, [15, 16, 17])] == [*run.shards[15:18]]
    queue.note_duration([1, 2, 3], 1.5)
    assert queue.usual_seconds(0) == 0.5
    assert queue.next_units(2) == [4, 5]
    assert not queue.repeat_late([4, 5, 6], 2.9), "at most twice as long as three take"
    for _ in range(ATTEMPTS):
        assert queue.put_back([4, 5], "it died") == [], "of neither alone"
    assert [queue.next_units(2), queue.next_units(2), queue.next_units(2)] == [[4], [5], [6, 7]]
    assert queue.put_back([4], "it died") == queue.put_back([4], "it died") == []
    ((source, error),) = queue.put_back([4], "it died")
    assert source is run
    assert "Shard 4 failed 3 times" in str(error)


def test_a_patch_is_shared_once_for_all_of_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many workers and cells use it; those that are done are let go."""
    stored: list[bytes] = []
    monkeypatch.setattr(ray, "put", lambda data: stored.append(data) or data)
    queue, cells = cell_queue(["loss"])
    for key in "aababcddcab":
        queue.units = [replace(cells[0], intervention=replace(cells[0].intervention, patch=patch_of(key)))]
        ((assignment,),) = queue.parts([0])
        assert assignment.cell.intervention.patch.read() == key.encode()
    assert stored == [b"a", b"b", b"c", b"d", b"a", b"b"]


def run_on(cluster: SimulatedCluster, task: Callable[[int], Any], ranks: int = 2) -> tuple[Any, list[Any]]:
    """Return what a task of simulated ranks gives, and its events."""
    events: list[Any] = []
    try:
        result = run_together(
            cluster.new_gang(Placement(ranks=ranks)),  # type: ignore[arg-type]
            cluster,  # type: ignore[arg-type]
            task,
            placement_seconds=PLACEMENT_SECONDS,
            hang_seconds=HANG_SECONDS,
            shortage=lambda: "Nothing is free.",
            on_event=events.append,
        )
        return result, events
    finally:
        assert not cluster.working, "the ranks are stopped in any case"


def test_the_first_rank_is_heard() -> None:
    cluster = SimulatedCluster()
    cluster.told = {"g0.0": ["begun"], "g0.1": ["not heard"]}
    assert run_on(cluster, lambda rank: 10 + rank) == (10, ["begun"])


def raises(error: Exception) -> Callable[[int], Any]:
    def task(rank: int) -> None:
        if rank == 1:
            raise error

    return task


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (Dies("its node was lost"), RunFailed, "Rank 1 was lost: .*its node was lost"),
        (KeyError("nothing there"), RunFailed, "Rank 1 failed: KeyError: 'nothing there'"),
        (ModelError("The model is odd."), ModelError, "The model is odd"),
        (Dies("No module named 'avss_dist'"), ConfigError, "cannot import avss_dist"),
    ],
)
def test_the_rank_that_fails_is_named(error: Exception, kind: type[AvssError], words: str) -> None:
    with pytest.raises(kind, match=f"(?s){words}"):
        run_on(SimulatedCluster(), raises(error))


def test_the_rank_that_failed_first_is_named_and_not_the_one_that_lost_its_connection() -> None:
    """Ray tells of a lost process some seconds later than the other ranks of their connection."""
    cluster = SimulatedCluster()

    def task(rank: int) -> None:
        cluster.at(5.0, lambda: cluster.gangs[0].kill(1, "out of memory"))
        raise DistNetworkError("Connection closed by peer")

    cluster.at(0.5, lambda: cluster.gangs[0]._calls[1][0].delay(100.0))
    with pytest.raises(RunFailed, match=r"(?s)Rank 1 was lost: .*out of memory"):
        run_on(cluster, task)


def test_a_rank_that_hangs_is_named() -> None:
    cluster = SimulatedCluster()
    cluster.at(0.5, lambda: cluster.gangs[0].freeze())
    with pytest.raises(RunFailed, match=r"^Rank 0 made no progress in 3\d seconds"):
        run_on(cluster, lambda rank: rank)
    assert cluster.gangs[0].killed_by_signal


def test_ranks_without_a_place_are_not_waited_for_forever_and_a_lost_cluster_ends_them() -> None:
    cluster = SimulatedCluster(1, slots=1)
    with pytest.raises(RunFailed, match=r"not placed in 60 seconds\. Nothing is free"):
        run_on(cluster, lambda rank: rank)
    assert PLACEMENT_SECONDS < cluster.clock < PLACEMENT_SECONDS + 10
    cluster.lost = RunFailed("The Ray cluster is lost.", "Start it again.")
    with pytest.raises(RunFailed, match="The Ray cluster is lost"):
        run_on(cluster, lambda rank: rank)


def test_a_cluster_may_get_more_gpus_and_a_machine_does_not() -> None:
    gpus = replace(devices_of("cuda", 80 << 30, count=4), cpus=8)
    pair = Placement(partition="zero3", ranks=2, gpus=2)
    for replicas, address, number in ((None, None, 2), (None, "auto", 2), ("4..64", "auto", 64), (2, None, 2)):
        executor = RayExecutor(Execution(executor="ray", replicas=replicas, address=address), Settings())
        executor.devices = gpus
        assert executor.replicas(pair) == number
    executor = RayExecutor(Execution(executor="ray", replicas="2..3"), Settings())
    executor.devices = gpus
    with pytest.raises(ConfigError, match=r"3 replicas of 2 GPUs need 6 GPUs; there are 4\."):
        executor.replicas(pair)
    executor.devices = replace(gpus, kind="cpu")
    with pytest.raises(ConfigError, match=r"3 replicas of 16 ranks need 48 CPUs; there are 8\."):
        executor.replicas(Placement(partition="zero3", ranks=16))


def on_cpus(*nodes: int, replicas: int | str | None = None, threads: int = 1) -> RayExecutor:
    """Return an executor on a cluster whose nodes have these numbers of CPUs."""
    execution = Execution(executor="ray", replicas=replicas, address="auto")
    executor = RayExecutor(execution, Settings(threads=threads))
    largest = max(nodes)
    executor.devices = replace(
        devices_of("cpu", 8 << 30), cpus=sum(nodes), cpus_of_largest_node=largest, cpus_of_nodes=nodes
    )
    return executor


@pytest.mark.parametrize(
    ("nodes", "options", "placement", "number"),
    [
        ((1, 1, 1), {}, Placement(), 3),
        ((8,), {}, Placement(), 1),
        ((0, 8, 8), {}, Placement(), 2),  # the head takes no work
        ((1, 4, 4), {"threads": 2}, Placement(), 2),
        ((1, 1, 1), {"threads": 2}, Placement(), 1),  # it waits for a node that is large enough
        ((8, 4, 2), {}, Placement(partition="tensor_parallel", ranks=4), 2),
        ((1, 1, 1), {"replicas": 1}, Placement(), 1),
        ((1, 1, 1), {"replicas": 8}, Placement(), 8),
    ],
)
def test_each_node_that_has_the_cpus_holds_a_replica_by_default(
    nodes: tuple[int, ...], options: dict[str, Any], placement: Placement, number: int
) -> None:
    assert on_cpus(*nodes, **options).replicas(placement) == number


def test_the_default_of_replicas_is_said_where_there_are_several_nodes() -> None:
    assert on_cpus(0, 1, 4, 4, threads=2).describe_default() == (
        "2 replicas will work, one on each node with 2 CPUs; the cluster has 3 nodes. Set replicas for another number."
    )
    assert on_cpus(8).describe_default() == ""
    assert on_cpus(8, 8, replicas=2).describe_default() == ""


@pytest.mark.parametrize(
    ("silence", "heard", "elapsed", "names"),
    [
        ({"g.0": 1.0, "g.1": 11.0}, ["g.0", "g.1"], 20.0, ["g.1"]),
        ({"g.0": 1.0, "g.1": 11.0}, ["g.0", "g.1"], 9.0, []),  # before this round it may have had nothing to do
        ({"g.0": 1.0, "g.1": 11.0}, ["g.0"], 20.0, []),  # it may still be starting
        ({"g.0": 1.0, "g.1": START_SECONDS + 1}, ["g.0"], 100.0, ["g.1"]),
        ({"g.0": START_SECONDS + 1}, [], 100.0, ["g.0"]),  # nothing was ever heard of this gang
        ({}, ["h.0"], 1000.0, []),  # the gang has no place yet
    ],
)
def test_a_rank_that_makes_no_progress_hangs(
    silence: dict[str, float], heard: list[str], elapsed: float, names: list[str]
) -> None:
    assert late(silence, heard, elapsed, hang_seconds=10.0) == names


def test_a_monitor_tells_progress_activity_and_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gang's activity is that of its current round: what its first rank reported before is not."""
    cluster = SimulatedCluster()
    monitor = HeartbeatMonitor()
    monkeypatch.setattr("avss_dist.runs.ray.heartbeats.time.monotonic", cluster.now)
    monkeypatch.setattr(cluster, "signs", monitor.signs)
    gang: Any = SimpleNamespace(names=["g.0"], find_processes=lambda: ["g.0"])
    watch = Watch(cluster, 30.0)  # type: ignore[arg-type]
    assert watch.listen()
    assert watch.doing(gang, -1.0) is None
    cluster.clock = 10.0
    monitor.report("g.0", 1, ("Repairing", 0.25))
    cluster.clock = 25.0
    monitor.report("g.0", 1, ("Repairing", 0.5))
    assert watch.listen()
    assert watch.doing(gang, 20.0) == ("Repairing", 0.5)
    assert watch.doing(gang, 25.0) is None
    assert monitor.signs()["g.0"] == (15.0, 0.0, ("Repairing", 0.5)), "its count has not grown"
    cluster.clock = 41.0
    assert watch.listen()
    assert watch.complaint(gang, 0.0) == "rank g.0 made no progress in 31 seconds"
    assert watch.complaint(gang, 20.0) == "", "a round of 21 seconds"
    monitor.report("g.0", 2)
    assert watch.listen()
    assert watch.complaint(gang, 0.0) == ""
    assert watch.doing(gang, 0.0) is None
    monitor.tell("g.0", "an event")
    assert monitor.take_events("g.0") == ["an event"]
    assert monitor.take_events("g.0") == []
    monkeypatch.setattr(cluster, "signs", lambda: None)
    assert not watch.listen(), "the monitor was lost with its node"


def test_a_node_fetches_what_only_the_head_has(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub checkpoint is found in the node's own cache; a folder must be on a disk that the node sees."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub"
    cached = hub / "models--org--tiny" / "snapshots" / revision
    shutil.copytree(tiny_llama, cached)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    of_the_head = Checkpoint(name="org/tiny", source="hub", path="/head/cache/org--tiny", revision=revision)
    on_node = resolve_on_node(of_the_head)
    assert on_node.path == str(cached)
    assert on_node.revision == revision
    assert resolve_on_node(on_node) is on_node
    with pytest.raises(ModelError, match=r"'/head/tiny' does not exist on the worker node"):
        resolve_on_node(Checkpoint(name="tiny", source="folder", path="/head/tiny", revision="0"))
