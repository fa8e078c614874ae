"""The reference executor, which is this process, and the choice between it and Ray."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, nullcontext
from datetime import UTC, datetime
from functools import partial
from itertools import chain, groupby, islice
from operator import itemgetter
from threading import Event, Semaphore
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch

from avss_dist.core.devices import (
    SPARE_SHARE,
    available_memory,
    computing_threads,
    devices_here,
    free_cores,
    pick_device,
)
from avss_dist.core.errors import AvssError, ConfigError, as_failure, own_copy
from avss_dist.core.settings import Settings
from avss_dist.core.streams import progress_to, say
from avss_dist.corpus.shards import Shard
from avss_dist.measure.observer import Hooks, attached
from avss_dist.measure.shard import analyze_shard, counter_bytes
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.partition.catalog import GANGS, PARTITIONS
from avss_dist.partition.choose import size_of
from avss_dist.partition.estimate import batch_bytes
from avss_dist.partition.execution import Execution
from avss_dist.partition.placement import Placement
from avss_dist.partition.replica import Replica
from avss_dist.runs.threads import Submissions
from avss_dist.runs.work import Outcome, ReplicaSlot, ReplicaSpec, RunShards, Underway, by_model
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.tasks.task import Cell, CellOutcome, CellResult, measure_cell

if TYPE_CHECKING:
    from avss_dist.runs.ray.executor import RayExecutor

Executor: TypeAlias = "LocalExecutor | RayExecutor"
"""Measures shards and cells. `LocalExecutor`, the reference, says what the methods of both promise."""

S = TypeVar("S")
T = TypeVar("T")


class LocalExecutor:
    """Executor that measures shards and cells in this process.

    Shards are measured in parallel on free cores, each with the settings' threads. The degree of parallelism changes no
    number: a shard's result is a pure function of its tokens.

    Attributes:
        devices: devices and memory that are available.
        plans_ahead: whether the next run may be planned while one is measured. Here planning would take its cores.
    """

    plans_ahead = False

    def __init__(self, settings: Settings) -> None:
        self.devices = devices_here(pick_device(settings.device).type)
        self._threads_of_torch = torch.get_num_threads()

    def connect(self) -> None:
        """Connect to the workers once, until `close`: here there are none. Other executors share the connection.

        Raises:
            ConfigError: the cluster cannot be reached.
            RunFailed: workers cannot be started here.
        """

    def replicas(self, placement: Placement) -> int:
        """Return the number of model copies of a placement that run in parallel: here 1.

        Raises:
            ConfigError: there are too few devices.
        """
        if placement.gpus > self.devices.count:
            raise ConfigError(
                f"A replica needs {placement.gpus} GPUs; there are {self.devices.count}.",
                "Lower `gpus_per_replica`.",
            )
        return 1

    def run(self, runs: Submissions[RunShards]) -> Generator[Outcome, None, None]:
        """Yield a result for every shard of every run: here one run after the other, and its shards in order.

        Others yield them in any order, and a shard may come twice, with equal results. An AvssError in place of a
        result ends its run alone: the model cannot be opened or observed, or a shard failed more often than it is
        retried. Runs that are dropped give no further results.

        Args:
            runs: runs that another thread submits meanwhile.
        """
        # OpenMP gives a new thread the number of the process, and not that of the thread which starts it.
        torch.set_num_threads(self._threads_of_torch)
        with closing(ReplicaSlot()) as slot:
            for spec, same in groupby(runs, key=lambda run_shards: run_shards.replica_spec):
                with computing_threads(spec.settings.threads):
                    yield from _measure_runs(slot, spec, same)

    def run_cells(
        self, rounds: Submissions[Sequence[Cell]], underway: Underway | None = None
    ) -> Generator[CellOutcome, None, None]:
        """Yield the result of every cell, in any order. An AvssError in its place concerns that cell alone.

        Models stay open from round to round.

        Args:
            rounds: rounds of cells. The next one may be submitted after all outcomes of one were taken.
            underway: called now and then in the middle of a cell that takes long.
        """
        groups = chain.from_iterable(map(by_model, rounds))
        for spec, groups_of_model in groupby(groups, key=itemgetter(0)):
            cells = chain.from_iterable(group for _, group in groups_of_model)
            with computing_threads(spec.settings.threads):
                try:
                    replica = spec.open()
                except Exception as error:
                    failure = as_failure(error)
                    for cell in cells:
                        yield cell, own_copy(failure)
                    continue
                with closing(replica):
                    assert replica.language_model is not None
                    for cell in cells:
                        yield cell, _measure_cell(replica.language_model, cell, underway)

    def apply(self, function: Callable[[S], T], items: Sequence[S]) -> Iterator[T]:
        """Yield the function's value for every item, in order, computed in parallel if there are several machines.

        Args:
            function, items: must be picklable.

        Raises:
            AvssError: the function raised it.
        """
        return map(function, items)

    def close(self) -> None:
        """Stop workers and free devices: here nothing outlives `run`."""


def shards_at_once(replica: Replica, spec: ReplicaSpec, strata: int = 1) -> int:
    """Return how many shards a replica measures at once: one for each free core, if their activations fit in memory.

    Args:
        strata: number of strata that a shard counts separately.
    """
    if not PARTITIONS[replica.model["partition"]].whole or replica.device.type != "cpu":
        return 1
    settings = spec.settings
    cores = free_cores() // settings.threads
    if cores <= 1:
        return 1
    size = size_of(spec.checkpoint, settings)
    if size is None:
        return 1
    available = int(available_memory() * SPARE_SHARE)
    activations = batch_bytes(size, settings)
    if "cpu" in spec.placement.max_memory:  # limit of weights and of the activations of one batch
        available = min(available, spec.placement.max_memory["cpu"] - size.weight_bytes + activations)
    return max(1, min(cores, available // (activations + counter_bytes(size, settings, strata))))


def _measure_cell(model: LanguageModel, cell: Cell, underway: Underway | None) -> CellResult | AvssError:
    """Return the result of a cell, or the error in its place."""
    try:
        with progress_to(partial(underway, cell)) if underway else nullcontext():
            return measure_cell(model, cell)
    except Exception as error:
        return as_failure(error)


def _measure_runs(slot: ReplicaSlot, spec: ReplicaSpec, runs: Iterator[RunShards]) -> Iterator[Outcome]:
    """Yield the results of runs with one replica, which is opened in place of the last one, or its error for each."""
    try:
        replica = slot.open(spec)
    except Exception as error:
        failure = as_failure(error)
        for run_shards in runs:
            yield run_shards, own_copy(failure)
        return
    with attached(replica.layers, spec.settings.sites, experts=spec.settings.experts) as hooks:
        for run_shards in runs:
            yield from _measure_shards(run_shards, replica, hooks)


def _measure_shards(run_shards: RunShards, replica: Replica, hooks: Hooks) -> Iterator[Outcome]:
    """Yield the results of a run's shards, in order. Its first error is the last outcome."""
    strata = max((len(set(shard.pairing.strata)) for shard in run_shards.shards if shard.pairing), default=1)
    at_once = shards_at_once(replica, run_shards.replica_spec, strata)
    threads = at_once
    if replica.device.type != "cpu":
        threads += 1  # It concludes the shards that a GPU has measured.
    computing = Semaphore(at_once)
    stopped = Event()

    def heartbeat() -> None:
        if stopped.is_set() or run_shards.dropped:
            raise CancelledError  # nobody needs the result

    def analyze(shard: Shard) -> ShardResult:
        with ExitStack() as stack:
            stack.enter_context(computing)
            return analyze_shard(
                replica,
                shard,
                run_shards.replica_spec.settings,
                heartbeat=heartbeat,
                hooks=hooks,
                computed=stack.close,
            )

    shards = iter(run_shards.shards)
    running: deque[Future[ShardResult]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            while not run_shards.dropped:
                for shard in islice(shards, 2 * threads - len(running)):
                    running.append(pool.submit(analyze, shard))
                if not running:
                    return
                try:
                    result = running.popleft().result()
                except CancelledError:
                    return
                except Exception as error:
                    yield run_shards, as_failure(error)
                    return
                yield run_shards, result
        finally:
            stopped.set()
            wait(running)


def _is_distributed(execution: Execution, settings: Settings) -> bool:
    """Whether there is a cluster, or more than one process to run."""
    if execution.address or os.environ.get("RAY_ADDRESS") or execution.node_labels:
        return True
    if execution.partition in GANGS:
        return True
    if execution.replicas:
        return execution.replicas.maximum > 1
    return settings.device != "cpu" and torch.cuda.device_count() > 1


def open_executor(execution: Execution, settings: Settings) -> Executor:
    """Open the requested executor. ``auto`` is Ray if there is a cluster, or more than one process to run.

    Raises:
        ConfigError: the cluster cannot be reached, or its workers lack this package.
    """
    if execution.executor == "local":
        return LocalExecutor(settings)
    if execution.executor == "auto" and not _is_distributed(execution, settings):
        return LocalExecutor(settings)
    from avss_dist.runs.ray.executor import RayExecutor

    executor = RayExecutor(execution, settings)
    try:
        line = executor.describe_default()  # errors of a cluster come before any run
    except BaseException:
        executor.close()
        raise
    if line:
        say(f"{datetime.now(UTC):%H:%M:%S} {line}")
    return executor
