"""A pool of Ray actors, each with a replica. The only module that imports ray.

A worker has one shard at a time and asks for the next when it is done, so a slow one never holds the rest. It keeps no
statistics: whatever dies with it is measured again elsewhere.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError

from avss_dist.config import Execution, Settings
from avss_dist.corpus import Shard
from avss_dist.errors import AvssError, ConfigError, RunFailed
from avss_dist.executors.base import Job
from avss_dist.partition.base import Replica, open_replica
from avss_dist.partition.single import pick_device
from avss_dist.stats import ShardResult
from avss_dist.worker import analyze_shard

ATTEMPTS = 3  # of a shard, and of opening a model, before the run fails
PLACEMENT_SECONDS = 300.0


class Worker:
    """The actor: opens the job's model once, measures the shards that it is given."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._job: Job | None = None
        self._replica: Replica | None = None

    def open(self, job: Job) -> int:
        """Open the job's model, in place of the last one. Returns the process id."""
        if job != self._job:
            if self._replica is not None:
                self._replica.close()
            self._replica = open_replica(job.checkpoint, job.settings, job.placement)
            self._job = job
        return os.getpid()

    def analyze(self, shard: Shard) -> ShardResult:
        """Measure one shard."""
        assert self._replica is not None and self._job is not None
        return analyze_shard(self._replica, shard, self._job.settings)


class RayExecutor:
    """See `executors.base.Executor`. Ray starts when it is first needed, and is stopped if it was started here."""

    def __init__(self, execution: Execution, settings: Settings) -> None:
        self._address = execution.address or os.environ.get("RAY_ADDRESS")
        self._started = False
        self._workers: list[Any] = []
        if self._address:
            self._connect()
            cluster = ray.cluster_resources()
            gpus, cpus = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 1))
            largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
            self.device = ("cuda" if gpus else "cpu") if settings.device == "auto" else settings.device
        else:
            self.device = pick_device(settings.device).type
            gpus, cpus = torch.cuda.device_count(), len(os.sched_getaffinity(0))
            largest = cpus
        self.replicas = execution.replicas or (gpus if self.device == "cuda" else 1)
        if self.device == "cuda" and self.replicas > gpus:
            raise ConfigError(
                f"{self.replicas} replicas were asked for, and there are {gpus} GPUs.", "Lower --replicas."
            )
        self._cpus = max(1, min(cpus // self.replicas, largest))
        if not self._address and self.replicas > cpus:
            raise ConfigError(
                f"{self.replicas} replicas were asked for, and there are {cpus} CPUs.", "Lower --replicas."
            )
        self._threads = int(os.environ.get("OMP_NUM_THREADS", 0)) or self._cpus

    def _connect(self) -> None:
        if ray.is_initialized():
            return
        try:
            ray.init(
                address=self._address or "local",
                include_dashboard=None if self._address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        except (ConnectionError, RayError, RuntimeError, ValueError, AssertionError) as error:
            where = f"Ray at {self._address}" if self._address else "a local Ray"
            raise RunFailed(
                f"{where} cannot be reached: {str(error).splitlines()[0]}",
                "Check --address (or RAY_ADDRESS), and that this machine has the cluster's token.",
            ) from error
        self._started = True

    def run(self, job: Job, shards: Sequence[Shard]) -> Generator[ShardResult, None, None]:
        """Yield a result for every shard, as workers finish them."""
        self._connect()
        pool = _Pool(self, job, shards)
        try:
            yield from pool.results()
        finally:
            self._workers += pool.idle()

    def hire(self) -> Any:
        """A new worker, or one that has no work."""
        if self._workers:
            return self._workers.pop()
        gpus = 1 if self.device == "cuda" else 0
        return ray.remote(Worker).options(num_cpus=self._cpus, num_gpus=gpus, max_restarts=0).remote(self._threads)

    def describe_shortage(self) -> str:
        """What was asked of the cluster, and what it has."""
        asked = f"{self._cpus} CPUs" + (" and 1 GPU" if self.device == "cuda" else "")
        free = ray.available_resources()
        has = ", ".join(f"{free[name]:g} {name}" for name in ("CPU", "GPU") if free.get(name))
        return f"A worker needs {asked}; the cluster has {has or 'nothing'} free."

    def close(self) -> None:
        """Stop the workers, and Ray if it was started here."""
        if not ray.is_initialized():
            return
        for worker in self._workers:
            ray.kill(worker)
        self._workers = []
        if self._started:
            ray.shutdown()


class _Pool:
    """The workers of one job: who has which shard, what is waiting, what failed how often."""

    def __init__(self, executor: RayExecutor, job: Job, shards: Sequence[Shard]) -> None:
        self._executor = executor
        self._job = job
        self._waiting = deque(shards)
        self._left = {shard.shard_id for shard in shards}
        self._busy: dict[Any, tuple[Any, Shard | None]] = {}  # None: the worker is opening the model
        self._idle: list[Any] = []
        self._failures: Counter[int | None] = Counter()

    def results(self) -> Iterator[ShardResult]:
        for _ in range(min(self._executor.replicas, len(self._waiting))):
            self._hire()
        deadline = time.monotonic() + PLACEMENT_SECONDS
        placed = False
        while self._left:
            ready, _ = ray.wait(list(self._busy), num_returns=1, timeout=5.0)
            for ref in ready:
                placed = True
                yield from self._finish(ref)
            if not placed and time.monotonic() > deadline:
                raise RunFailed(
                    f"No worker was placed in {PLACEMENT_SECONDS:.0f} seconds. {self._executor.describe_shortage()}",
                    "Free some of it, ask for fewer --replicas, or use another cluster.",
                )

    def idle(self) -> list[Any]:
        """Workers that can take another job; those that are still at work are stopped."""
        for worker, _ in self._busy.values():
            ray.kill(worker)
        self._busy = {}
        return self._idle

    def _hire(self) -> None:
        worker = self._executor.hire()
        self._busy[worker.open.remote(self._job)] = (worker, None)

    def _give_work(self, worker: Any) -> None:
        if self._waiting:
            shard = self._waiting.popleft()
            self._busy[worker.analyze.remote(shard)] = (worker, shard)
        else:
            self._idle.append(worker)

    def _finish(self, ref: Any) -> Iterator[ShardResult]:
        worker, shard = self._busy.pop(ref)
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            if isinstance(error.cause, AvssError):
                raise error.cause from None
            self._replace(worker, shard, f"{type(error.cause).__name__}: {error.cause}")
            return
        except (RayActorError, OutOfMemoryError) as error:
            self._replace(worker, shard, str(error).splitlines()[0])
            return
        if shard is not None and shard.shard_id in self._left:
            self._left.discard(shard.shard_id)
            yield result
        self._give_work(worker)

    def _replace(self, worker: Any, shard: Shard | None, why: str) -> None:
        ray.kill(worker)
        self._retry(shard, why)
        self._hire()

    def _retry(self, shard: Shard | None, why: str) -> None:
        """Put a shard back, or fail the run when it, or opening the model, has failed too often."""
        key = shard.shard_id if shard else None
        self._failures[key] += 1
        if self._failures[key] >= ATTEMPTS:
            what = f"Shard {key}" if shard else "Opening the model"
            raise RunFailed(
                f"{what} failed {ATTEMPTS} times; the last time: {why}", "Everything measured so far is kept."
            )
        if shard:
            self._waiting.appendleft(shard)
