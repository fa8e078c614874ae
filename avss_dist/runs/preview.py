"""What a job would do, told without loading a weight: runs, where they stand, how long they may take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from avss_dist.errors import AvssError, as_failure
from avss_dist.executors.base import Executor
from avss_dist.models.size import Footprint
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planner import PlannedRun, Planner
from avss_dist.settings import GANGS
from avss_dist.warehouse.reader import Warehouse

MATRIX = 1024  # rows and columns, of the multiplication that is timed
MATRIX_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Preview:
    """A run that was not made.

    Attributes:
        model, corpus: the run's title, and the corpus as it was named.
        revision: the hub's commit, or the SHA-256 of the files.
        partition: the one that would be chosen.
        status: ``done``, ``partial`` (some shards are kept), ``missing``, or ``refused`` (error says why).
        weight_bytes: of the model in memory; None where it cannot be told.
        num_tokens, num_shards, kept_shards: of the plan, and what of it is measured.
        seconds: what is left to measure may take; None where it is nothing, or cannot be told.
        basis: where the speed comes from.
    """

    model: str
    corpus: str
    status: str
    revision: str = ""
    partition: str = ""
    weight_bytes: int | None = None
    num_tokens: int = 0
    num_shards: int = 0
    kept_shards: int = 0
    seconds: float | None = None
    basis: str = ""
    error: str | None = None


def preview(specs: Sequence[RunSpec], store: Warehouse, executor: Executor) -> Iterator[Preview]:
    """Plan every run from configurations and headers, and look up where it stands. Nothing is written.

    Time is arithmetic: floating-point operations by a speed, which is the median of done runs in the warehouse on the
    same kind of device or, where there are none, that of a matrix multiplication on this machine: then it takes longer.
    """
    planner = Planner(executor, store, fetch=False)
    speed = _Speed(store, executor)
    for spec in specs:
        try:
            planned = planner.prepare(spec)
            size = planner.size(spec, planned.replica_spec.checkpoint, planned.replica_spec.settings)
            kept = _kept(store, planned)
        except Exception as error:
            message = as_failure(error).message
            yield Preview(model=spec.title, corpus=spec.corpus, status="refused", error=message)
            continue
        shards, corpus = planned.corpus.shards, planned.corpus
        status = "done" if kept is None else "partial" if kept else "missing"
        left = 0.0 if kept is None else 1 - kept / len(shards)
        yield Preview(
            model=spec.title,
            corpus=spec.corpus,
            status=status,
            revision=planned.replica_spec.checkpoint.revision,
            partition=planned.replica_spec.placement.partition,
            weight_bytes=size.weight_bytes if size else None,
            num_tokens=corpus.num_tokens,
            num_shards=len(shards),
            kept_shards=kept or 0,
            seconds=left * speed.seconds(planned, size) if left and size else None,
            basis=speed.basis,
        )


def _kept(store: Warehouse, planned: PlannedRun) -> int | None:
    """Shards that are measured; None where the run is done."""
    if (store.run(planned.run.run_id) or {}).get("status") == "done":
        return None
    return sum(1 for _ in store.each_shard(planned.run.run_id, planned.expected))


class _Speed:
    """Floating-point operations per second of one replica."""

    def __init__(self, store: Warehouse, executor: Executor) -> None:
        self._executor = executor
        try:
            rows = [row for row in store.runs().to_pylist() if row["status"] == "done"]
        except AvssError:  # there is no warehouse yet
            rows = []
        on_cpu = executor.device == "cpu"
        speeds = [_flops(row) for row in rows if (row["device"] == "cpu") == on_cpu and row["num_parameters"]]
        self._measured = median(speeds) if speeds else None
        self._timed: dict[str, float] = {}
        self.basis = (
            f"at the speed of {len(speeds)} runs in the warehouse"
            if speeds
            else "at least: at the speed of a matrix multiplication on this machine"
        )

    def seconds(self, planned: PlannedRun, size: Footprint) -> float:
        """Of the whole run, by all replicas."""
        replicas = planned.replicas
        if self._measured is not None:
            return 2 * size.num_parameters * planned.corpus.num_tokens / (self._measured * replicas)
        flops = size.forward_flops(planned.corpus.num_sequences, planned.replica_spec.settings.sequence_length)
        ranks = planned.replica_spec.placement.ranks if planned.replica_spec.placement.partition in GANGS else 1
        shared = replicas * ranks if self._executor.device == "cpu" else 1  # CPUs of one machine are shared
        return flops * shared / (self._of_matrices(size.dtype) * replicas * ranks)

    def _of_matrices(self, dtype: str) -> float:
        if dtype not in self._timed:
            self._timed[dtype] = _time_matrices(getattr(torch, dtype), self._executor.device)
        return self._timed[dtype]


def _flops(row: dict[str, Any]) -> float:
    return float(2 * row["num_parameters"] * row["tokens_per_second"] / max(1, row["replicas"] or 1))


def _time_matrices(dtype: torch.dtype, device: str) -> float:
    where = device if device == "cpu" or torch.cuda.is_available() else "cpu"
    a = torch.ones(MATRIX, MATRIX, dtype=dtype, device=where)
    a @ a
    start, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - start) < MATRIX_SECONDS or not count:
        (a @ a).sum().item()
        count += 1
    return 2 * MATRIX**3 * count / max(passed, 1e-9)
