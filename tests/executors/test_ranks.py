"""Tasks of several ranks: the first rank's result and events, and the error of the rank that failed first.

And how many replicas there is room for, which ranks hang, and what a gang is doing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.util import placement_group_table
from support.devices import devices_of
from support.processes import ray_processes, wait_until
from support.simulated_cluster import Dies, SimulatedCluster
from torch.distributed import DistNetworkError

from avss_dist.core.errors import AvssError, ConfigError, ModelError, RunFailed
from avss_dist.core.settings import Execution, Settings
from avss_dist.executors.ray.cluster import START_SECONDS, Watch, late
from avss_dist.executors.ray.executor import RayExecutor
from avss_dist.executors.ray.heartbeats import HeartbeatMonitor
from avss_dist.executors.ray.ranks import RankedRun
from avss_dist.partition.replica import Placement

HANG_SECONDS, PLACEMENT_SECONDS = 30.0, 60.0


def run_on(cluster: SimulatedCluster, task: Callable[[int], Any], ranks: int = 2) -> tuple[Any, list[Any]]:
    """Return what a task of simulated ranks gives, and its events."""
    events: list[Any] = []
    run = RankedRun(
        cluster.new_gang(Placement(ranks=ranks)),  # type: ignore[arg-type]
        cluster,  # type: ignore[arg-type]
        placement_seconds=PLACEMENT_SECONDS,
        hang_seconds=HANG_SECONDS,
        shortage=lambda: "Nothing is free.",
        on_event=events.append,
    )
    try:
        return run.result(task), events  # type: ignore[arg-type]
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


def test_ranks_without_a_place_are_not_waited_for_forever() -> None:
    cluster = SimulatedCluster(1, slots=1)
    with pytest.raises(RunFailed, match=r"not placed in 60 seconds\. Nothing is free"):
        run_on(cluster, lambda rank: rank)
    assert PLACEMENT_SECONDS < cluster.clock < PLACEMENT_SECONDS + 10


def test_a_lost_cluster_ends_the_task() -> None:
    cluster = SimulatedCluster(1, slots=1)
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
    cluster, monitor = SimulatedCluster(), HeartbeatMonitor()
    monkeypatch.setattr("avss_dist.executors.ray.heartbeats.time.monotonic", cluster.now)
    monkeypatch.setattr(cluster, "signs", monitor.signs)
    gang: Any = SimpleNamespace(names=["g.0"], find_processes=lambda: ["g.0"])
    watch = Watch(cluster, 30.0)  # type: ignore[arg-type]
    assert watch.listen() and watch.doing(gang, -1.0) is None
    cluster.clock = 10.0
    monitor.report("g.0", 1, ("Repairing", 0.25))
    cluster.clock = 25.0
    monitor.report("g.0", 1, ("Repairing", 0.5))
    assert watch.listen() and watch.doing(gang, 20.0) == ("Repairing", 0.5) and watch.doing(gang, 25.0) is None
    assert monitor.signs()["g.0"] == (15.0, 0.0, ("Repairing", 0.5)), "its count has not grown"
    cluster.clock = 41.0
    assert watch.listen() and watch.complaint(gang, 0.0) == "rank g.0 made no progress in 31 seconds"
    assert watch.complaint(gang, 20.0) == "", "a round of 21 seconds"
    monitor.report("g.0", 2)
    assert watch.listen() and watch.complaint(gang, 0.0) == "" and watch.doing(gang, 0.0) is None
    monitor.tell("g.0", "an event")
    assert monitor.take_events("g.0") == ["an event"] and monitor.take_events("g.0") == []
    monkeypatch.setattr(cluster, "signs", lambda: None)
    assert not watch.listen(), "the monitor was lost with its node"


@dataclass(frozen=True)
class Sum:
    """Sums the ranks' numbers, after an event of each."""

    device: str = "cpu"

    def run(self, heartbeat: Callable[[], None], on_event: Callable[[Any], None]) -> Any:
        import torch
        from torch import distributed

        rank = distributed.get_rank()
        heartbeat()
        on_event(f"rank {rank} begins")
        number = torch.tensor([float(10 + rank)])
        distributed.all_reduce(number)
        on_event(number.item())
        return rank, number.item()


@pytest.mark.nightly
@pytest.mark.usefixtures("warm_workers")
def test_ranks_on_a_real_cluster() -> None:
    """The first rank is heard. Ranks that divide a shard are kept on one node that has room, and none is left."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import it
    events: list[Any] = []
    with closing(RayExecutor(Execution(placement_seconds=8.0), Settings(device="cpu"))) as executor:
        assert executor.run_ranks(Sum(), 2, threads=1, on_event=events.append) == (0, 21.0)
        assert events == ["rank 0 begins", 21.0]
        with pytest.raises(RunFailed, match=r"not placed in 8 seconds.*needs 50 workers of 1 CPUs"):
            executor.run_ranks(Sum(), 50, threads=1, on_event=events.append)
        for partition, threads, strategy in (
            ("tensor_parallel", 1, "STRICT_PACK"),
            ("tensor_parallel", 2048, "PACK"),
            ("fsdp", 1, "PACK"),
        ):
            gang = executor._new_gang(Placement(partition=partition, ranks=2), threads=threads)
            assert placement_group_table(gang._group)["strategy"] == strategy
            gang.stop()
        wait_until(lambda: not ray_processes())
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
