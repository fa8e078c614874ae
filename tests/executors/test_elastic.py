"""Replicas come and go with the nodes of a real Ray cluster while a run goes on: the bytes are those of one worker."""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from support.noting import noting
from support.processes import wait_until
from support.ray_cluster import NODES, TWENTY_SHARDS, Cluster
from support.tables import assert_same_tables

import avss_dist
from avss_dist.core.errors import ConfigError, RunFailed
from avss_dist.executors.ray import queue
from avss_dist.executors.ray.cluster import RayCluster
from avss_dist.executors.ray.heartbeats import HeartbeatMonitor
from avss_dist.warehouse.reader import Warehouse

pytestmark = pytest.mark.nightly

SHARDS = 20


@pytest.fixture
def cluster(ray_cluster: Cluster) -> Cluster:
    """Three nodes, whatever the last test has left."""
    draining = ray_cluster.draining()
    for i, node in enumerate(ray_cluster.nodes):
        if i >= NODES or node.node_id in draining:
            ray_cluster.kill_node(node)
    ray_cluster.restore()
    return ray_cluster


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For notes; no worker is helped because it is late."""
    monkeypatch.setattr(queue, "LATE_SECONDS", 3600.0)
    (tmp_path / "notes").mkdir()
    return tmp_path / "notes"


@pytest.fixture(scope="module")
def undisturbed(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    assert score(tiny_llama, out, executor="local").num_shards == SHARDS
    return out


def score(model: Path, out: Path, **changes: Any) -> avss_dist.Run:
    return avss_dist.score(model, warehouse=out, corpus="builtin:pydoc", **{**TWENTY_SHARDS, **changes})


def monitor_on(node: Any) -> Any:
    """A raylet that has not heard of the node yet would start it elsewhere."""
    there = NodeAffinitySchedulingStrategy(node.node_id, soft=True)
    options = {"num_cpus": 0, "max_restarts": -1, "scheduling_strategy": there}
    actor: Any = ray.remote(HeartbeatMonitor)
    while True:
        monitor = actor.options(**options).remote()
        ray.get(monitor.signs.remote())
        if ray._private.state.actors(monitor._actor_id.hex())["Address"]["NodeID"] == node.node_id:
            return monitor
        ray.kill(monitor)


def test_the_monitor_leaves_a_node_that_drains(cluster: Cluster) -> None:
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        leaving = cluster.nodes[1]
        connection = RayCluster(monitor_on(leaving))
        cluster.drain(leaving)
        assert cluster.draining() == {leaving.node_id}
        connection.leave(cluster.draining())
        wait_until(lambda: not any(node["Alive"] for node in ray.nodes() if node["NodeID"] == leaving.node_id))
        wait_until(lambda: connection.signs() is not None)
    finally:
        ray.shutdown()


class Meanwhile(threading.Thread):
    """What happens while a run goes on; it has happened at the end of the block."""

    def __init__(self, happens: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._happens = happens
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            self._happens()
        except BaseException as error:
            self._error = error

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.join()
        if self._error is not None:
            raise self._error


def test_three_nodes_grow_to_five_and_lose_two_in_one_run(
    cluster: Cluster,
    folder: Path,
    tiny_llama: Path,
    undisturbed: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two replicas join in mid-run, and two are lost without notice: only the shards that they had are done again.

    A line for each lost node says which, on standard error and among the notes of the run.
    """
    lost: list[str] = []
    with noting(folder, {8: "grown", 13: "shrunk"}) as notes:

        def happens() -> None:
            wait_until(lambda: len(notes.shards) >= 3)
            for _ in range(2):
                cluster.grow()
            wait_until(lambda: len({note.node for note in notes.shards}) == 5)
            notes.open("grown")
            wait_until(lambda: len(notes.shards) == 18)  # 13 are done, five wait
            for node in cluster.nodes[1:3]:
                lost.append(node.node_id)
                cluster.kill_node(node)
            notes.open("shrunk")

        with Meanwhile(happens):
            run = score(tiny_llama, tmp_path / "w", executor="ray", address=cluster.address, replicas="2..5")
    assert (run.status, run.resumed_shards) == ("done", 0)
    assert_same_tables(tmp_path / "w", undisturbed)
    begun = Counter(note.what for note in notes.shards)
    in_flight = {note.what for note in notes.shards if note.node in lost and int(note.what) >= 13}
    assert len(in_flight) == 2 and len(begun) == SHARDS
    assert {shard for shard, times in begun.items() if times > 1} == in_flight
    told = re.compile(r"he node [\d.]+ \((\w{8})\) was lost; shard (\d+) is measured again")
    had = {note.node[:8]: note.what for note in notes.shards if note.node in lost and int(note.what) >= 13}
    row = Warehouse(tmp_path / "w").run(run.run_id)
    assert row is not None and dict(told.findall("\n".join(row["notes"]))) == had
    assert dict(told.findall(capsys.readouterr().err)) == had


def test_work_goes_to_nodes_with_the_labels(
    cluster: Cluster, folder: Path, tiny_llama: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Of one worker as of a group. What lacks is counted on these nodes alone."""
    where: dict[str, Any] = {"executor": "ray", "address": cluster.address, "node_labels": ["zone=a"]}
    labelled = {cluster.grow(zone="a").node_id, cluster.grow(zone="a").node_id}
    for name, placement in (("one", {"replicas": 1}), ("group", {"partition": "zero3", "ranks": 2, "replicas": 1})):
        with noting(folder, {}) as notes:
            assert score(tiny_llama, tmp_path / name, **where, **placement).status == "done"
        assert {note.node for note in notes.opens} <= labelled
        assert len({note.node for note in notes.opens}) == placement.get("ranks", 1)
        assert_same_tables(tmp_path / name, undisturbed)
    with pytest.raises(ConfigError, match=r"No node .* `node_labels` zone=b\.\nLabels of its nodes: zone=a") as caught:
        score(tiny_llama, tmp_path / "none", **{**where, "node_labels": ["zone=b"]})
    assert caught.value.exit_code == 2
    few = r"3 seconds\. A worker needs 1 CPUs; \d of 2 CPUs are free on nodes with zone=a"
    with pytest.raises(RunFailed, match=few):
        score(tiny_llama, tmp_path / "few", **where, replicas="3..3", placement_seconds=3)
