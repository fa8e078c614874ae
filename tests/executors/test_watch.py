"""Reports of ranks: which ranks hang, and what a gang is doing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from support.simulated_cluster import SimulatedCluster

from avss_dist.executors.ray.cluster import START_SECONDS, Watch, late
from avss_dist.executors.ray.heartbeats import HeartbeatMonitor


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
