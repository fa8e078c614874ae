"""Cells on Ray workers: one actor for each replica, which pulls its next cell when it is done with one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from avss_dist.errors import AvssError, RunFailed
from avss_dist.executors.ray.gang import missing_package, resolve_on_node
from avss_dist.executors.ray.queue import ATTEMPTS
from avss_dist.tasks.cells import Cell, CellOutcome, CellResult, CellRunner


class CellWorker:
    """The actor."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._runner = CellRunner()

    def run(self, cell: Cell) -> CellResult:
        """Measure a cell."""
        checkpoint = resolve_on_node(cell.checkpoint, trust_remote_code=cell.settings.trust_remote_code)
        return self._runner.run(replace(cell, checkpoint=checkpoint))


def run_on_ray(
    cells: Sequence[Cell], replicas: int, cpus: int, gpus: int, threads: int
) -> Generator[CellOutcome, None, None]:
    """See `executors.base.Executor.run_cells`. A worker that is lost is replaced, and its cell measured again.

    Args:
        replicas: workers, each with ``cpus``, ``gpus`` and ``threads``.
    """
    actor: Any = ray.remote(CellWorker).options(num_cpus=cpus, num_gpus=gpus, max_restarts=0)
    waiting, failures = deque(cells), Counter[Cell]()
    busy: dict[Any, tuple[Any, Cell]] = {}  # by the reference that is awaited: the worker, and its cell

    def employ(worker: Any) -> None:
        cell = waiting.popleft()
        busy[worker.run.remote(cell)] = worker, cell

    try:
        for _ in range(min(replicas, len(cells))):
            employ(actor.remote(threads))
        while busy:
            (reference,), _ = ray.wait(list(busy), num_returns=1)
            worker, cell = busy.pop(reference)
            try:
                yield cell, ray.get(reference)
            except RayTaskError as error:
                yield cell, _as_error(error.cause)
            except RayError as error:
                if missing := missing_package(error):
                    raise missing from error
                failures[cell] += 1
                why = str(error).splitlines()[0]
                if failures[cell] < ATTEMPTS:
                    waiting.appendleft(cell)
                else:
                    yield cell, RunFailed(f"{cell.task} failed {failures[cell]} times, at last: {why}")
                worker = actor.remote(threads)
            if waiting:
                employ(worker)
    finally:
        for worker, _ in busy.values():
            with suppress(RayError):
                ray.kill(worker)


def _as_error(error: Exception) -> AvssError:
    return error if isinstance(error, AvssError) else RunFailed(f"{type(error).__name__}: {error}")
