"""Gangs: groups of one or several workers that hold one replica together.

If a rank is lost, the other ranks of its gang are stopped too, because they would wait for it forever.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from avss_dist.core.errors import ConfigError
from avss_dist.core.extras import PATH_MEANING
from avss_dist.core.process import current_umask
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.queue import shape
from avss_dist.runs.ray.worker import Assignment, Worker
from avss_dist.runs.work import RankTask, ReplicaSpec


class Gang:
    """The workers of one replica, or of a task of several ranks, and their reserved resources: a CPU for each thread.

    Args:
        labels: labels that the nodes of its workers must have.
        one_node: all its workers must be on the same node; otherwise on as few as there is room on.
        spread: put its worker, if it has only one, on another node than those of other gangs, if there is room.

    Attributes:
        placed: a reference that is ready when its first rank has a process that answers.
        spec: replica that every rank has open; None if unknown.
        leaves: whether one of its nodes is draining. The gang finishes its round and takes no other.
    """

    def __init__(
        self,
        name: str,
        placement: Placement,
        *,
        threads: int,
        monitor: ActorHandle,
        labels: Mapping[str, str],
        one_node: bool = False,
        spread: bool = False,
    ) -> None:
        self.shape = shape(placement)
        self.spec: ReplicaSpec | None = None
        self.leaves = False
        self.names = [f"{name}.{rank}" for rank in range(placement.ranks)]
        resources = {"num_cpus": threads, "num_gpus": placement.gpus // placement.ranks}
        self._group: PlacementGroup | None = None
        options: dict[str, object] = {}
        if placement.ranks == 1:
            options["max_concurrency"] = 2 if placement.gpus else 1
            options["label_selector"] = dict(labels)
            if spread:
                options["scheduling_strategy"] = "SPREAD"
        else:
            bundle = {"CPU": threads}
            if placement.gpus:
                bundle["GPU"] = resources["num_gpus"]
            self._group = placement_group(
                [bundle] * placement.ranks,
                strategy="STRICT_PACK" if one_node else "PACK",
                bundle_label_selector=[dict(labels)] * placement.ranks,
            )
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        actor: Any = ray.remote(Worker)
        actor = actor.options(max_restarts=0, **resources, **options)
        umask = current_umask()
        self._workers: list[ActorHandle] = [actor.remote(name, threads, monitor, umask) for name in self.names]
        self.placed: ObjectRef = self._workers[0].address.remote()
        self._processes: dict[str, tuple[str, int]] = {}  # the node's and the process's id, by rank

    @property
    def is_placed(self) -> bool:
        """Whether its first worker is known to have a process."""
        return self.names[0] in self._processes or bool(ray.wait([self.placed], timeout=0)[0])

    @property
    def nodes(self) -> set[str]:
        """Ids of the nodes on which its ranks have processes."""
        self.find_processes()
        return {node for node, _ in self._processes.values()}

    def find_processes(self) -> Collection[str]:
        """Return the names of the ranks that have a process, whether it answers or not."""
        for name, worker in zip(self.names, self._workers, strict=True):
            if name not in self._processes:
                actor = ray._private.state.actors(worker._actor_id.hex())
                if actor.get("Pid"):  # no other interface of Ray knows processes that do not answer yet
                    self._processes[name] = actor["Address"]["NodeID"], actor["Pid"]
        return self._processes.keys()

    def open(self, spec: ReplicaSpec) -> list[ObjectRef]:
        """Open a model on every rank. Returns a reference for each."""
        return [worker.open.remote(spec, rank, self.placed) for rank, worker in enumerate(self._workers)]

    def run(self, task: RankTask[object, object]) -> list[ObjectRef]:
        """Do a task on all ranks together. Returns a reference for each rank."""
        ranks = len(self._workers)
        shared = ray.put(task)  # copied once to each node
        return [worker.run.remote(shared, rank, ranks, self.placed) for rank, worker in enumerate(self._workers)]

    def measure(self, parts: Sequence[Sequence[Assignment]]) -> list[ObjectRef]:
        """Give each rank its assignments in a round. Returns a reference for each rank."""
        return [worker.measure_round.remote(part) for worker, part in zip(self._workers, parts, strict=True)]

    def stop(self, *, hangs: bool = False) -> None:
        """Stop every worker and release the resources. Workers of a hanging gang are killed by a signal too."""
        for worker in self._workers:
            ray.kill(worker)
        if hangs:
            for node_id, process in self._processes.values():
                on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
                ray.remote(_kill).options(num_cpus=0, scheduling_strategy=on_node).remote(process)
        if self._group is not None:
            remove_placement_group(self._group)


def _kill(process: int) -> None:
    """Kill a process that does not react to Ray (SIGSTOP) and would keep its memory and devices."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGKILL)


def missing_package(error: Exception) -> ConfigError | None:
    """Return the error to show if workers cannot import this package, or None for any other error."""
    if "No module named 'avss_dist'" not in str(error):
        return None
    return ConfigError(
        "The cluster's workers cannot import avss_dist (No module named 'avss_dist').",
        f"Install this version in the image or the environment of every node: pip install PATH, {PATH_MEANING}.",
    )
