"""A Ray cluster of three nodes on this machine: every process of it can be killed, and what was lost is replaced."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Set
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster as RayCluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from support.processes import wait_until

NODES = 3
TWENTY_SHARDS: dict[str, Any] = {
    "max_sequences": 160,
    "sequence_length": 64,
    "batch_size": 2,
    "sequences_per_shard": 8,
    "partition": "single",
}
PREEMPTION = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
SIZE: dict[str, Any] = {"num_cpus": 1, "object_store_memory": 80_000_000}
HEAD: dict[str, Any] = {**SIZE, "include_dashboard": False, "include_log_monitor": False, "no_monitor": True}


class Cluster:
    """Nodes of one CPU, for a ``with`` block. The first one is the head, and the node of every driver here."""

    def __init__(self, nodes: int = NODES) -> None:
        self._nodes = nodes
        self._ray = RayCluster(shutdown_at_exit=False)  # this process has its own way to end

    def __enter__(self) -> Cluster:
        self.restore()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def address(self) -> str:
        """``HOST:PORT`` of the head."""
        return str(self._ray.address)

    @property
    def logs(self) -> Path:
        """The folder of all logs."""
        return Path(self._ray.head_node.get_logs_dir_path())

    def restore(self) -> None:
        """Replace the nodes that were lost, and all where the head was."""
        if not self.has_head or not _has_agent(self.nodes[0]):
            self.stop()
            objects = {"max_direct_call_object_size": 0}  # every result is one
            self._ray.add_node(**HEAD, _system_config=objects)
        for node in [node for node in self.nodes[1:] if not _has_agent(node)]:
            self.kill_node(node)
        for _ in range(self._nodes - len(self.nodes)):
            self._ray.add_node(**SIZE)
        expected = {node.node_id for node in self.nodes}
        wait_until(lambda: self.alive() == expected)

    def grow(self, **labels: str) -> Any:
        """Another node, as an autoscaler or a person brings one."""
        return self._ray.add_node(**SIZE, labels=labels)

    def drain(self, node: Any) -> None:
        """Give a node notice, as a cloud does that takes a spot machine back; it ends when nothing runs on it."""
        gcs: Any = GcsClient(address=self.address)
        accepted, why = gcs.drain_node(node.node_id, PREEMPTION, "a notice of preemption", 0)
        assert accepted, why

    def draining(self) -> Set[str]:
        """The ids of the nodes that were given notice, and live."""
        gcs: Any = GcsClient(address=self.address)
        return gcs.get_draining_nodes().keys()

    def alive(self) -> Set[str]:
        """The ids of the nodes that the cluster counts, among them nodes that died a moment ago."""
        gcs: Any = GcsClient(address=self.address)
        states = gcs.get_all_node_info(state_filter=GcsNodeInfo.GcsNodeState.Value("ALIVE"))
        return {node_id.hex() for node_id in states}

    @property
    def has_head(self) -> bool:
        """Whether the GCS and the raylet beside it run."""
        head = self._ray.head_node
        return head is not None and bool(_running(head, "gcs_server") and _running(head, "raylet"))

    @property
    def nodes(self) -> list[Any]:
        """The head, and the others in the order of their ports."""
        return [self._ray.head_node, *sorted(self._ray.worker_nodes, key=lambda node: node.node_manager_port)]

    def kill_node(self, node: Any) -> None:
        """A node with all that runs on it."""
        _kill(children(node, ""))
        self._ray.remove_node(node, allow_graceful=False)

    def workers(self) -> list[psutil.Process]:
        """The processes of all `runs.ray.worker.Worker`."""
        processes = []
        for node in self.nodes:
            processes += children(node, "ray::Worker")
        return processes

    def services(self, name: str) -> list[psutil.Process]:
        """Every ``raylet``, or the ``gcs_server``, that runs."""
        processes = []
        for node in self.nodes:
            processes += _running(node, name)
        return processes

    def stop(self) -> None:
        """Kill all of it."""
        for node in self._ray.list_all_nodes():
            _kill(children(node, ""))
        if self._ray.list_all_nodes():
            self._ray.shutdown()


def _running(node: Any, name: str) -> list[psutil.Process]:
    infos = node.all_processes.get(name, ())
    return [psutil.Process(info.process.pid) for info in infos if info.process.poll() is None]


def children(node: Any, name: str) -> list[psutil.Process]:
    """The processes that a node's raylet started, by the beginning of their names; the oldest first."""
    started = []
    with suppress(psutil.NoSuchProcess):
        candidates: list[psutil.Process] = []
        for raylet in _running(node, "raylet"):
            candidates += raylet.children()
        for child in candidates:
            with suppress(psutil.NoSuchProcess):
                if child.name().startswith(name) and child.status() != psutil.STATUS_ZOMBIE:
                    started.append(child)
    return sorted(started, key=lambda child: child.pid)


def _has_agent(node: Any) -> bool:
    return len(children(node, "ray::DashboardAgent")) == 1


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            os.kill(process.pid, signal.SIGKILL)
