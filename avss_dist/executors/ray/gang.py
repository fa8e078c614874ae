"""Workers (Ray actors), and gangs: the workers, one or several, that hold one replica together.

A gang lives and dies as one: where a rank is lost, the others are stopped too, for they would wait for it for ever.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util import get_node_ip_address
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from avss_dist.corpus.shards import Shard
from avss_dist.errors import ConfigError, ModelError
from avss_dist.executors.base import ReplicaSpec
from avss_dist.executors.ray.queue import shape
from avss_dist.measure.shard import analyze_shard, follow
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.partition.base import Placement, Replica
from avss_dist.partition.open import open_replica
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.system.devices import pick_device
from avss_dist.warehouse.encoding import encode_shard
from avss_dist.warehouse.schema import RunIdentity

BEAT_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """What one rank does in a round: measure a shard, or only run along with those that do."""

    shard: Shard | None
    rows: int
    forwards: int
    run_id: str = ""


class Worker:
    """The actor: one rank of a replica. Opens the replica_spec's model once, measures the shards that it is given.

    A thread tells `HeartbeatMonitor` how far it is: layers begun while it measures, seconds while it opens.
    """

    def __init__(self, name: str, threads: int, beats: Any) -> None:
        torch.set_num_threads(threads)
        self._name, self._beats = name, beats
        self._count, self._opening = 0, True
        self._replica_spec: ReplicaSpec | None = None
        self._replica: Replica | None = None
        self._joined = False
        threading.Thread(target=self._report, daemon=True).start()

    def _report(self) -> None:
        while True:
            self._count += self._opening
            with suppress(Exception):  # a lost report only makes the worker look slower
                self._beats.report.remote(self._name, self._count)
            time.sleep(BEAT_SECONDS)

    def _beat(self) -> None:
        self._count += 1

    def address(self) -> tuple[str, int, str, int]:
        """This process: its node's address, a free port there, the node's id, the process id."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        return get_node_ip_address(), port, ray.get_runtime_context().get_node_id(), os.getpid()

    def open(self, replica_spec: ReplicaSpec, rank: int, first: tuple[str, int, str, int]) -> None:
        """Open the replica_spec's model, in place of the last one, together with the other ranks.

        Args:
            first: the `address` of rank 0.
        """
        self._opening = True
        if replica_spec.placement.ranks > 1 and not self._joined:
            from avss_dist.partition.group import join

            device = pick_device(replica_spec.settings.device)
            join(rank, replica_spec.placement.ranks, first[0], first[1], device=device)
            self._joined = True
        if replica_spec != self._replica_spec:
            if self._replica is not None:
                self._replica.close()
            self._replica_spec, self._replica = None, None
            checkpoint = resolve_on_node(
                replica_spec.checkpoint, trust_remote_code=replica_spec.settings.trust_remote_code
            )
            self._replica = open_replica(checkpoint, replica_spec.settings, replica_spec.placement)
            self._replica_spec = replica_spec
        self._opening = False

    def analyze(self, task: Task) -> ShardResult | None:
        """Measure a shard; None where this rank has none to report."""
        assert self._replica is not None and self._replica_spec is not None
        self._beat()
        if task.shard is None:
            follow(self._replica, task.forwards)
            return None
        result = analyze_shard(
            self._replica,
            task.shard,
            self._replica_spec.settings,
            rows=task.rows,
            forwards=task.forwards,
            beat=self._beat,
        )
        return self._encoded(result, task.run_id) if self._replica.reports_stats else None

    def _encoded(self, result: ShardResult, run_id: str) -> ShardResult:
        """The result with its partial made here, for there are more workers than drivers."""
        assert self._replica_spec is not None
        of = self._replica_spec.checkpoint
        family = result.model["family"]
        run = RunIdentity(run_id=run_id, model=of.name, revision=of.revision, family=family)
        return replace(result, stats=encode_shard(run, result))


class Gang:
    """The workers of one replica, and the resources that are held for them."""

    def __init__(self, name: str, placement: Placement, *, cpus: int, threads: int, beats: Any) -> None:
        self.shape = shape(placement)
        self.replica_spec: ReplicaSpec | None = None  # whose model every rank has open
        self.names = [f"{name}.{rank}" for rank in range(placement.ranks)]
        resources = {"num_cpus": cpus, "num_gpus": placement.gpus // placement.ranks}
        self._group: Any = None
        options: dict[str, Any] = {}
        if placement.ranks > 1:
            bundle = {"CPU": cpus, **({"GPU": resources["num_gpus"]} if placement.gpus else {})}
            self._group = placement_group([bundle] * placement.ranks, strategy="PACK")
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(self._group)
        actor: Any = ray.remote(Worker).options(max_restarts=0, **resources, **options)
        self._workers: list[Any] = [actor.remote(worker, threads, beats) for worker in self.names]
        self.placed: list[Any] = [worker.address.remote() for worker in self._workers]

    def open(self, replica_spec: ReplicaSpec) -> list[Any]:
        """Open a replica_spec's model on every rank; one reference for each."""
        return [worker.open.remote(replica_spec, rank, self.placed[0]) for rank, worker in enumerate(self._workers)]

    def analyze(self, tasks: Sequence[Task]) -> list[Any]:
        """Give each rank its task; one reference for each."""
        return [worker.analyze.remote(task) for worker, task in zip(self._workers, tasks, strict=True)]

    def stop(self) -> None:
        """Stop every worker, those that hang too, and give the resources back."""
        addresses = ray.wait(self.placed, num_returns=len(self.placed), timeout=0)[0]
        for worker in self._workers:
            ray.kill(worker)
        for reference in addresses:
            with suppress(ray.exceptions.RayError):
                _, _, node, process = ray.get(reference)
                there = NodeAffinitySchedulingStrategy(node, soft=False)
                ray.remote(_kill).options(num_cpus=0, scheduling_strategy=there).remote(process)
        if self._group is not None:
            remove_placement_group(self._group)


def _kill(process: int) -> None:
    """A process that is stopped (SIGSTOP) does not hear Ray, and would keep its memory and devices."""
    with suppress(ProcessLookupError, PermissionError):
        os.kill(process, signal.SIGKILL)


def resolve_on_node(checkpoint: Checkpoint, *, trust_remote_code: bool = False) -> Checkpoint:
    """The driver's checkpoint as this node has it; what comes from the hub is fetched where it is not here yet.

    Raises:
        ModelError: a folder or file that this node does not see, or a hub that it cannot reach.
    """
    if Path(checkpoint.path).exists():
        return checkpoint
    if checkpoint.source != "hub":
        raise ModelError(
            f"'{checkpoint.path}' is not on the node {socket.gethostname()}, which has a worker.",
            "Put checkpoints on a disk that all nodes see, under the same path.",
        )
    return resolve(f"{checkpoint.name}@{checkpoint.revision}", trust_remote_code=trust_remote_code)


def missing_package(error: Exception) -> ConfigError | None:
    """What to tell of an error of workers that cannot import this package; None of any other error."""
    if "No module named 'avss_dist'" not in str(error):
        return None
    return ConfigError(
        "The cluster's workers have no avss_dist (No module named 'avss_dist').",
        "Install this version in the image, or the environment, of every node: pip install avss_dist.",
    )
