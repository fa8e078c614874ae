"""Driver of runs: plans them, skips finished ones, executes the others on one pool of workers, commits results."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from avss_dist.core.errors import AvssError, StorageFull, as_failure
from avss_dist.core.settings import fingerprint
from avss_dist.executors import Executor
from avss_dist.executors.interface import RunShards
from avss_dist.models.checkpoints import slug
from avss_dist.runs.events import (
    OnRunEvent,
    RunEnded,
    RunPlaced,
    RunReading,
    RunRepeated,
    RunStarted,
    ShardMeasured,
)
from avss_dist.runs.job_file import RunSpec
from avss_dist.runs.planner import Planner
from avss_dist.runs.run import Run, RunInProgress
from avss_dist.warehouse.store import SharedWarehouse, Store, shared

UNCOMMITTED = 8  # results that may wait for storage before workers wait, too

Ending = tuple[RunSpec, Run | AvssError]


class Driver:
    """Runs checkpoints with one executor into one warehouse.

    While shards are measured, the next run is planned (in a thread of the executor's) and results are committed (in a
    thread of the driver's, in the order in which they came).
    """

    def __init__(self, store: Store, executor: Executor, on_event: OnRunEvent, *, fresh: bool = False) -> None:
        self._store, self._executor, self._on_event, self._fresh = store, executor, on_event, fresh
        self._planner = Planner(executor, store)
        self._in_progress: dict[RunShards, tuple[RunSpec, RunInProgress]] = {}
        self._run_ids: dict[str, str] = {}  # names of the first specs, by run id
        self._ended: deque[Ending] = deque()
        self._full = False
        self._done = 0
        self._shared: SharedWarehouse | None = None
        self._room = threading.BoundedSemaphore(UNCOMMITTED)

    def run(self, specs: Sequence[RunSpec]) -> Iterator[Ending]:
        """Yield each run as it ends: done, skipped, or the error that ended it. Other runs continue.

        Raises:
            AvssError: the executor itself failed.
        """
        try:
            with shared(self._store) as self._shared, ThreadPoolExecutor(1, "commit") as self._committer:
                try:
                    with closing(self._executor.run(self._plan_runs(specs))) as outcomes:
                        for shards, outcome in outcomes:
                            self._receive(shards, outcome)
                            while self._ended:
                                yield self._ended.popleft()
                except Exception as error:  # of the executor itself: every run in progress has failed
                    for shards in list(self._in_progress):
                        self._receive(shards, as_failure(error))
                    raise as_failure(error) from error
        except KeyboardInterrupt as stop:
            self._add_note(stop, len(specs))
            raise
        while self._ended:
            yield self._ended.popleft()

    def _add_note(self, stop: KeyboardInterrupt, specs: int) -> None:
        """Add a note to an interrupt: how many of several runs are done, and how many shards of others are stored."""
        several = specs > 1
        notes = [f"{self._done} of {specs} runs are done"] if several else []
        runs = [running.run for _, running in self._in_progress.values()]
        if total := sum(run.num_shards for run in runs):
            with suppress(AvssError):
                stored = sum(self._store.num_partials(run.run_id) for run in runs)
                notes.append(f"{stored} of {total} shards {'of the runs in progress ' if several else ''}are kept")
        if notes:
            stop.add_note(" and ".join(notes))

    def _plan_runs(self, specs: Sequence[RunSpec]) -> Iterator[RunShards]:
        """Yield the shards to measure, run by run. Once storage is full, no further run begins."""
        for spec in specs:
            try:
                self._on_event(RunReading(spec.name))
                planned = self._planner.prepare(spec)
                run = planned.run
                if run.run_id in self._run_ids:
                    self._on_event(RunRepeated(spec.name, self._run_ids[run.run_id]))
                stored = {} if self._fresh else self._store.run(run.run_id) or {}
                if run.run_id in self._run_ids or stored.get("status") == "done":
                    self._run_ids.setdefault(run.run_id, spec.name)
                    self._end(spec, run)
                    continue
                if self._full:
                    hint = "Free some space and run the same command again."
                    error = StorageFull(f"Not begun: no space left on {self._store.root}.", hint)
                    error.run_id = run.run_id
                    self._ended.append((spec, error))
                    continue
                self._run_ids[run.run_id] = spec.name
                self._on_event(RunPlaced(spec.name, planned.replica_spec.placement))
                running = RunInProgress(planned, self._store, fresh=self._fresh, shared=self._shared)
            except Exception as error:
                self._ended.append((spec, as_failure(error)))
                continue
            self._on_event(RunStarted(spec.name, run.num_tokens, running.done_tokens))
            self._in_progress[running.shards] = spec, running
            if running.missing:
                yield running.shards
            else:
                self._commit(running.shards, self._finish)

    def _receive(self, shards: RunShards, outcome: Any) -> None:
        """Receive a result of a run, or the error that ends it, and queue its commit."""
        _, running = self._in_progress.get(shards, (None, None))
        if running is None:
            return
        if isinstance(outcome, AvssError) or running.counts(outcome):
            self._commit(shards, partial(self._keep, outcome))
            if not isinstance(outcome, AvssError) and not running.missing:
                self._commit(shards, self._finish)

    def _commit(self, shards: RunShards, step: Callable[[RunSpec, RunInProgress], None]) -> None:
        self._room.acquire()
        self._committer.submit(self._attempt, shards, step).add_done_callback(lambda _: self._room.release())

    def _attempt(self, shards: RunShards, step: Callable[[RunSpec, RunInProgress], None]) -> None:
        """Carry out a step of a run. An error in it ends the run, whose later steps do nothing."""
        if shards not in self._in_progress:
            return
        spec, running = self._in_progress[shards]
        try:
            step(spec, running)
        except Exception as raised:
            error = as_failure(raised)
            del self._in_progress[shards]
            self._full |= isinstance(error, StorageFull)
            with suppress(AvssError):  # storage that fails; the first error says why
                running.fail(error)
            self._ended.append((spec, error))

    def _keep(self, outcome: Any, spec: RunSpec, running: RunInProgress) -> None:
        if isinstance(outcome, AvssError):
            raise outcome
        running.keep(outcome)
        self._on_event(ShardMeasured(spec.name, outcome.num_tokens))

    def _finish(self, spec: RunSpec, running: RunInProgress) -> None:
        run = running.finish(self._executor.apply)
        del self._in_progress[running.shards]
        self._end(spec, run)

    def _end(self, spec: RunSpec, run: Run) -> None:
        self._done += 1
        self._on_event(RunEnded(spec.name, run))
        self._ended.append((spec, run))


def record_failure(store: Store, spec: RunSpec, error: AvssError) -> Run:
    """Return a failed run, after recording it unless it is recorded already, as after its fingerprint was computed."""
    settings = spec.settings.as_dict()
    print_ = fingerprint(model=spec.model, corpus=spec.corpus, settings=settings)
    run_id = error.run_id or f"{slug(Path(spec.model).name)}-{print_[:10]}"
    if not error.run_id:
        row = {
            "run_id": run_id,
            "fingerprint": print_,
            "status": "failed",
            "error": str(error),
            "created_at": datetime.now(UTC),
            "model": spec.model,
            "corpus": spec.corpus,
            "settings": json.dumps(settings),
        }
        with suppress(StorageFull):  # the error is reported all the same
            store.write_run(row)
    return Run(run_id=run_id, model=spec.model, warehouse=store.root, status="failed", error=str(error))
