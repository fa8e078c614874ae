"""Replicas as gangs of Ray actors, on this machine or on a cluster."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import count, islice
from typing import Any, TypeVar

import ray
from ray import ObjectRef
from ray.exceptions import LocalRayletDiedError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from avss_dist.core.devices import Devices, devices_here, pick_device
from avss_dist.core.errors import AvssError, ConfigError, RunFailed
from avss_dist.core.process import preserve_sigterm_handler
from avss_dist.core.settings import Settings
from avss_dist.core.text import count_of
from avss_dist.partition.catalog import GANGS, PARTITIONS
from avss_dist.partition.execution import Execution
from avss_dist.partition.group import lost_rank
from avss_dist.partition.placement import Placement
from avss_dist.runs.ray.cluster import (
    RayCluster,
    Watch,
    has_head,
    node_lost,
    require_gcs,
    require_head,
)
from avss_dist.runs.ray.gang import Gang, missing_package
from avss_dist.runs.ray.heartbeats import HeartbeatMonitor
from avss_dist.runs.ray.pool import Pool, QueueSource
from avss_dist.runs.ray.queue import ATTEMPTS, CellQueue, ShardQueue
from avss_dist.runs.threads import Submissions
from avss_dist.runs.work import Outcome, RankTask, RunShards, Underway, by_model
from avss_dist.tasks.task import Cell, CellOutcome

Event = TypeVar("Event")
S = TypeVar("S")
T = TypeVar("T")
EVENT_SECONDS = 0.5  # between two looks at the events of ranks
CHECK_SECONDS = 5.0  # between two looks at their nodes and heartbeats
PROCESS_SECONDS = 10.0  # until Ray knows that a process is dead; the other ranks lose their connection before


class RayExecutor:
    """Executor that measures shards and cells on Ray workers.

    Ray starts when it is first needed, and is stopped if it was started here.

    Attributes:
        plans_ahead: whether the next run may be planned while one is measured: here by other processes.
    """

    plans_ahead = True

    def __init__(self, execution: Execution, settings: Settings) -> None:
        self._execution = execution
        self._settings = settings
        self._address = execution.address or os.environ.get("RAY_ADDRESS")
        if execution.node_labels and not self._address:
            raise ConfigError(
                "`node_labels` chooses nodes of a running cluster; none was named.", "Name one with `address`."
            )
        self._labels = dict(label.split("=", 1) for label in execution.node_labels)
        self._started = False
        self._names = count()
        self._monitor: Any = None

    @cached_property
    def devices(self) -> Devices:
        """Devices of the cluster, or of this machine if there is none.

        Raises:
            ConfigError: the cluster cannot be reached, or its workers lack this package.
        """
        if not self._address:
            return devices_here(pick_device(self._settings.device).type)
        self.connect()
        return _devices_of_cluster(self._settings.device, self._labels)

    def replicas(self, placement: Placement) -> int:
        """Return the number of model copies of a placement that run in parallel.

        By default, it is the number of GPUs that replicas have room on or, without GPUs, the number of nodes of the
        cluster. A cluster may have room for fewer now, and for more when nodes come.
        """
        devices = self.devices
        cpus = placement.ranks * self._settings.threads
        if self._execution.replicas:
            workers = self._execution.replicas.maximum
        elif devices.kind == "cuda":
            workers = devices.count // max(1, placement.gpus)
        else:
            workers = devices.nodes_with(cpus)
        replicas = max(1, workers // placement.copies)
        if self._address:
            return replicas  # There may be room for more when nodes come.
        if devices.kind == "cuda":
            if replicas * placement.gpus > devices.count:
                raise ConfigError(
                    f"{replicas} replicas of {placement.gpus} GPUs need {replicas * placement.gpus} GPUs; "
                    f"there are {devices.count}.",
                    "Lower `replicas`, `ranks` or `gpus_per_replica`.",
                )
        elif replicas * cpus > devices.cpus:
            need = f"need {replicas * cpus} CPUs; there are {devices.cpus}."
            if placement.ranks > 1:
                raise ConfigError(
                    f"{replicas} replicas of {placement.ranks} ranks {need}", "Lower `replicas` or `ranks`."
                )
            raise ConfigError(f"{replicas} replicas {need}", "Lower `replicas`.")
        return replicas

    def describe_default(self) -> str:
        """Return a sentence on the replicas that work by default, if they work on the CPUs of several nodes."""
        devices = self.devices
        nodes = devices.nodes_with(1)
        if self._execution.replicas or devices.kind != "cpu" or nodes < 2:
            return ""
        ranks = 1
        if self._execution.partition in GANGS:
            ranks = self._execution.ranks or 2
        cpus = ranks * self._settings.threads
        replicas = max(1, devices.nodes_with(cpus))
        return (
            f"{count_of(replicas, 'replica')} will work, one on each node with {count_of(cpus, 'CPU')}; the cluster "
            f"has {nodes} nodes. Set replicas for another number."
        )

    def run(self, runs: Submissions[RunShards]) -> Generator[Outcome, None, None]:
        """Yield results as workers finish them, and notes on the runs. Runs share the workers."""
        return self._measure(QueueSource(runs, lambda run_shards: [ShardQueue(run_shards)]))

    def run_cells(
        self, rounds: Submissions[Sequence[Cell]], underway: Underway | None = None
    ) -> Generator[CellOutcome, None, None]:
        """Yield the result of every cell, or an AvssError in its place. See `runs.local.LocalExecutor`."""

        def queues_of(cells: Sequence[Cell]) -> list[CellQueue]:
            return [CellQueue(spec, group, underway) for spec, group in by_model(cells)]

        return self._measure(QueueSource(rounds, queues_of))

    def _measure(self, queues: QueueSource[Any]) -> Generator[tuple[Any, Any], None, None]:
        if not queues.wait():
            return
        self.connect()
        minimum = 1
        if self._execution.replicas:
            minimum = self._execution.replicas.minimum
        pool = Pool(
            queues,
            new_gang=self._new_gang,
            replicas=self.replicas,
            minimum=minimum,
            cluster=RayCluster(self._monitor),
            placement_seconds=self._execution.placement_seconds,
            hang_seconds=self._execution.hang_seconds,
            shortage=lambda placement: _shortage(placement, self._settings.threads, self._labels),
        )
        try:
            yield from pool.outcomes()
        except OSError as error:  # the raylet does not answer
            raise node_lost() from error
        finally:
            with suppress(OSError):
                if has_head():  # else the cluster ends its workers itself
                    pool.close()

    def run_ranks(self, task: RankTask[Event, T], ranks: int, *, threads: int, on_event: Callable[[Event], None]) -> T:
        """Have ranks do a task together, and return what the first one returns. See `run_together`.

        Args:
            threads: CPU threads of each rank.
            on_event: receives the events of the first rank.
        """
        self.connect()
        placement = Placement(ranks=ranks, gpus=ranks if task.device == "cuda" else 0)
        try:
            return run_together(
                self._new_gang(placement, threads),
                RayCluster(self._monitor),
                task,
                placement_seconds=self._execution.placement_seconds,
                hang_seconds=self._execution.hang_seconds,
                shortage=lambda: _shortage(placement, threads, self._labels),
                on_event=on_event,
            )
        except OSError as error:  # the raylet does not answer
            raise node_lost() from error

    def apply(self, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
        """Yield the function's value for every item, in order, computed in parallel by Ray tasks.

        Tasks reserve no CPU, as workers may hold all. Lost ones run here.
        """
        if not ray.is_initialized():
            yield from map(function, items)
            return
        task: Any = ray.remote(_call).options(num_cpus=0, scheduling_strategy="SPREAD")
        pending = iter(items)
        running: deque[tuple[S, ObjectRef]] = deque()
        at_once = max(2, self.devices.cpus // 2)
        while True:
            for item in islice(pending, at_once - len(running)):
                running.append((item, task.remote(function, item)))
            if not running:
                return
            item, reference = running.popleft()
            try:
                yield ray.get(reference)
            except RayTaskError as error:
                if isinstance(error.cause, AvssError):
                    raise error.cause from None
                raise
            except RayError:
                yield function(item)

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        if ray.is_initialized() and self._monitor is not None:
            ray.kill(self._monitor)
        if ray.is_initialized() and self._started:
            ray.shutdown()

    def connect(self) -> None:
        """Start Ray, or reach the cluster, if that is not done yet."""
        if not ray.is_initialized():
            try:
                require_gcs(self._address or "local")
                with preserve_sigterm_handler():
                    ray.init(
                        address=self._address or "local",
                        include_dashboard=None if self._address else False,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
            except (OSError, RayError, RuntimeError, ValueError, AssertionError) as error:
                raise self._unreachable(error) from error
            self._started = True
            ray._private.worker._worker_logs_enabled = False  # of lost workers and nodes, on standard output
        if self._monitor is None:
            own_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
            monitor: Any = ray.remote(HeartbeatMonitor)
            self._monitor = monitor.options(num_cpus=0, max_restarts=-1, scheduling_strategy=own_node).remote()

    def _unreachable(self, error: Exception) -> AvssError:
        """Return the error for a cluster that cannot be reached, or a local Ray that cannot be started."""
        reason = str(error).splitlines()[0]
        hint = "Check `address` (or RAY_ADDRESS), and that this machine has the cluster's token."
        if self._address:
            return ConfigError(f"Ray at {self._address} cannot be reached: {reason}", hint)
        return RunFailed(f"a local Ray cannot be reached: {reason}", hint)

    def _new_gang(self, placement: Placement, threads: int | None = None) -> Gang:
        """Start a gang. It is on one node, if that has room, where ranks exchange parts of a shard in every layer."""
        require_head()
        threads = threads or self._settings.threads
        if placement.gpus:
            has_room = placement.gpus <= self.devices.count_of_largest_node
        else:
            has_room = placement.ranks * threads <= self.devices.cpus_of_largest_node
        info = PARTITIONS[placement.partition]
        return Gang(
            f"{os.getpid()}-{next(self._names)}",
            placement,
            threads=threads,
            monitor=self._monitor,
            labels=self._labels,
            one_node=info.gang and not info.splits_data and has_room,
            spread=self._execution.replicas is None and not placement.gpus,
        )


def run_together(
    gang: Gang,
    cluster: RayCluster,
    task: RankTask[Event, T],
    *,
    placement_seconds: float,
    hang_seconds: float,
    shortage: Callable[[], str],
    on_event: Callable[[Event], None],
) -> T:
    """Have the ranks of a gang do a task, and return what the first one returns. The workers are stopped in any case.

    Args:
        cluster: the Ray cluster of the gang.
        placement_seconds: how long to wait for a place for all ranks.
        hang_seconds: how long a rank may begin no layer.
        shortage: describes the resources that the cluster lacks.
        on_event: receives the events of the first rank.

    Raises:
        AvssError: a rank raised it.
        RunFailed: a rank was lost, hangs or raised another exception, or the ranks were not placed in time.
    """
    watch = Watch(cluster, hang_seconds)
    hangs = False
    results: dict[int, T] = {}
    placed_at: float | None = None
    requested_at = cluster.now()
    checked_at = requested_at
    try:
        waiting = {reference: rank for rank, reference in enumerate(gang.run(task))}
        while waiting:
            ready = cluster.wait([*waiting], number=1, seconds=EVENT_SECONDS)
            for event in cluster.events(gang.names[0]):
                on_event(event)
            for reference in ready:
                try:
                    results[waiting[reference]] = cluster.get(reference)
                except RayError as error:
                    raise _first_error(cluster, waiting, reference, error) from error
                del waiting[reference]
            if cluster.now() - checked_at <= min(CHECK_SECONDS, hang_seconds / 4):
                continue
            checked_at = cluster.now()
            cluster.require_node()
            if placed_at is None and gang.is_placed:
                placed_at = checked_at
            if placed_at is not None:
                complaint = watch.complaint(gang, placed_at) if watch.listen() else ""
                if complaint:
                    hangs = True
                    raise _hanging(complaint, gang)
            elif checked_at - requested_at > placement_seconds:
                raise RunFailed(
                    f"The ranks were not placed in {placement_seconds:.0f} seconds. {shortage()}",
                    "Free some of it, lower `ranks`, or use another cluster.",
                )
    finally:
        gang.stop(hangs=hangs)
    return results[0]


def _hanging(complaint: str, gang: Gang) -> RunFailed:
    """Return the error for a rank that hangs. A complaint about it names the rank after the name of its gang."""
    gang_name = gang.names[0].removesuffix("0")
    complaint = complaint.replace(gang_name, "", 1)
    return RunFailed(f"{complaint[0].upper()}{complaint[1:]}.", "Run the same command again, or raise `hang_seconds`.")


def _first_error(
    cluster: RayCluster, waiting: dict[ObjectRef, int], reference: ObjectRef, error: RayError
) -> AvssError:
    """Return the error of the rank that failed first. The other ranks only lose their connection to it."""
    rank = waiting.pop(reference)
    if waiting and isinstance(error, RayTaskError) and lost_rank(error.cause):
        for other in cluster.wait([*waiting], number=1, seconds=PROCESS_SECONDS):
            try:
                cluster.get(other)
            except RayError as first_error:
                rank = waiting[other]
                error = first_error
    missing = missing_package(error)
    if missing is not None:
        return missing
    if not isinstance(error, RayTaskError):
        cluster.require_node()
        return RunFailed(f"Rank {rank} was lost: {str(error).splitlines()[0]}", "Run the same command again.")
    cause = error.cause
    if isinstance(cause, AvssError):
        return cause
    return RunFailed(f"Rank {rank} failed: {type(cause).__name__}: {cause}", "Its traceback is shown with `-v`.")


def _call(function: Callable[[S], T], item: S) -> T:
    return function(item)


def _shortage(placement: Placement, cpus: int, labels: Mapping[str, str]) -> str:
    """Describe the resources that a placement needs, and how many of them the nodes with these labels have."""
    require_head()
    needed = {"CPU": cpus}
    gpus = placement.gpus // placement.ranks
    if gpus:
        needed["GPU"] = gpus
    nodes = _nodes(labels)
    free_by_node = ray._private.state.available_resources_per_node()
    resources = [node["Resources"] for node in nodes]
    free = [free_by_node.get(node["NodeID"], {}) for node in nodes]
    are_free = []
    largest = {}
    for name in needed:
        are_free.append(f"{_total(free, name):g} of {_total(resources, name):g} {name}s")
        largest[name] = max((node.get(name, 0.0) for node in resources), default=0)
    who = f"A replica needs {placement.ranks} workers of" if placement.ranks > 1 else "A worker needs"
    where = f"on nodes with {_in_words(labels)}" if labels else "in the cluster"
    return (
        f"{who} {_numbers(needed)}; {', '.join(are_free)} are free {where}. The largest node has {_numbers(largest)}."
    )


def _total(nodes: Iterable[Mapping[str, float]], name: str) -> float:
    """Return how many of a resource nodes have together."""
    return sum(node.get(name, 0.0) for node in nodes)


def _nodes(labels: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Return the alive nodes of the cluster with these labels, as ``ray.nodes`` does."""
    return [node for node in ray.nodes() if node["Alive"] and labels.items() <= node["Labels"].items()]


def _in_words(labels: Mapping[str, str]) -> str:
    return " and ".join(f"{name}={value}" for name, value in labels.items())


def _numbers(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{number:g} {name}s" for name, number in resources.items())


def _devices_of_cluster(device: str, labels: Mapping[str, str]) -> Devices:
    """Return the devices of the alive nodes with these labels. Memory is measured on one that a worker could be on.

    Raises:
        ConfigError: no node has the labels.
    """
    nodes = [node["Resources"] for node in _nodes(labels)]
    if not nodes:
        raise _no_labelled_node(labels)
    gpus = [int(node.get("GPU", 0)) for node in nodes]
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    kind = device
    if kind == "auto":
        kind = "cuda" if any(gpus) else "cpu"
    on_gpus = kind == "cuda"
    probed = _devices_of_node(kind, labels, gpus=1 if on_gpus and any(gpus) else 0)
    return Devices(
        kind=kind,
        count=int(_total(nodes, "GPU")) if on_gpus else 1,
        count_of_largest_node=max(gpus) if on_gpus else 1,
        device_bytes=probed.device_bytes,
        host_bytes=probed.host_bytes,
        cpus=int(_total(nodes, "CPU")) or 1,
        cpus_of_largest_node=max(cpus) or 1,
        cpus_of_nodes=tuple(cpus),
    )


def _no_labelled_node(labels: Mapping[str, str]) -> ConfigError:
    """Return the error for labels that no node has. It lists the labels of the nodes, without Ray's ids of nodes."""
    of_nodes: set[str] = set()
    for node in ray.nodes():
        of_nodes.update(f"{name}={value}" for name, value in node["Labels"].items())
    names = sorted(label for label in of_nodes if not label.startswith("ray.io/node-id="))
    hint = f"Labels of its nodes: {', '.join(names)}." if names else "Its nodes have no labels: ray start --labels."
    return ConfigError(f"No node of the cluster has `node_labels` {_in_words(labels)}.", hint)


def _devices_of_node(kind: str, labels: Mapping[str, str], *, gpus: int) -> Devices:
    """Return the devices of a node with these labels that has the given number of free GPUs."""
    probe = ray.remote(devices_here).options(
        num_cpus=0,
        num_gpus=gpus,
        max_retries=0,  # Ray prints them
        label_selector=dict(labels),
    )
    for attempt in count(1):
        try:
            devices: Devices = ray.get(probe.remote(kind))
            break
        except RayError as error:
            missing = missing_package(error)
            if missing is not None:
                raise missing from error
            if isinstance(error, LocalRayletDiedError):
                raise node_lost() from error
            if attempt == ATTEMPTS:
                what = str(error).splitlines()[0]
                raise RunFailed(f"The Ray cluster failed before any work began: {what}", "Run it again.") from error
    return devices
