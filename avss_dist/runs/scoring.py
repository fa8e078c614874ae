"""Scoring of checkpoints: one, several, or those of a job file. The driver plans runs and commits their results."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from avss_dist.core.errors import AvssError, StorageFull, as_failure, own_copy
from avss_dist.core.registry import GANGS
from avss_dist.core.settings import Execution, Settings, fingerprint
from avss_dist.core.validation import keywords
from avss_dist.corpus.sources import corpus_problems
from avss_dist.models.checkpoints import slug
from avss_dist.requests import ScoreAllRequest, ScoreRequest
from avss_dist.runs.events import (
    LogRuns,
    OnRunEvent,
    RunEnded,
    RunReading,
    RunStarted,
    ShardMeasured,
)
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.local import Executor, open_executor
from avss_dist.runs.planner import Planner
from avss_dist.runs.run import Run, RunInProgress
from avss_dist.runs.work import RunShards
from avss_dist.warehouse.store import Store

__all__ = ["Run", "run_job", "score", "score_all"]

UNCOMMITTED = 8  # results that may wait for storage before workers wait, too


@keywords(ScoreRequest)
def score(request: ScoreRequest) -> Run:
    """Score one checkpoint and store the result in a warehouse. A run that is done is not repeated."""
    return score_models(request, [str(request.model)], alone=True)[0]


@keywords(ScoreAllRequest)
def score_all(request: ScoreAllRequest) -> list[Run]:
    """Score several checkpoints with one pool of workers. A failing run is recorded and does not stop the others."""
    return score_models(request, request.models)


def score_models(request: ScoreRequest | ScoreAllRequest, models: Sequence[str], *, alone: bool = False) -> list[Run]:
    """Score checkpoints, after the corpus was checked once for all of them.

    Args:
        alone: raise the error of the one model instead of recording it.
    """
    settings, execution, on_event = request.settings, request.execution, request.on_event or LogRuns()
    for _, problem in corpus_problems([request.corpus], {settings.chat_template}):
        raise problem
    specs = [
        RunSpec(model=model, corpus=request.corpus, settings=settings, execution=execution, title=model, name=model)
        for model in models
    ]
    return _run_all(specs, Store(request.warehouse), settings, execution, on_event, alone=alone)


def run_job(job: JobFile, on_event: OnRunEvent | None = None, **options: Any) -> list[Run]:
    """Execute the runs of a job file that are not done. A failing run is recorded and does not stop the others.

    Args:
        on_event: receives the events of the runs.
        options: fields of ``settings.Execution`` in place of the job's: ``address``, ``replicas``, ``fresh``, ...

    Raises:
        AvssError: a mistake that concerns all runs, such as an unwritable warehouse or too few devices.
    """
    specs, execution = overridden(job, options)
    return _run_all(specs, Store(job.warehouse), job.settings, execution, on_event or LogRuns())


def overridden(job: JobFile, options: dict[str, Any]) -> tuple[list[RunSpec], Execution]:
    """Return the runs of a job and its execution settings, overridden by options."""
    specs = [replace(spec, execution=replace(spec.execution, **options)) for spec in job.specs]
    return specs, replace(job.execution, **options)


def executor_for(specs: Sequence[RunSpec], settings: Settings, execution: Execution) -> Executor:
    """Open the executor for runs. If a run's partition is a gang, the executor must have several processes."""
    gang = next((spec.execution for spec in specs if spec.execution.partition in GANGS), execution)
    return open_executor(gang, settings)


def _run_all(
    specs: Sequence[RunSpec],
    store: Store,
    settings: Settings,
    execution: Execution,
    on_event: OnRunEvent,
    *,
    alone: bool = False,
) -> list[Run]:
    """Return the run of every spec, in order. Errors of the warehouse and of the executor come before any work.

    Args:
        alone: raise the error of the one run instead of recording it.
    """
    store.storage.create()
    runs: dict[int, Run] = {}
    with closing(executor_for(specs, settings, execution)) as executor:
        for spec, ending in Driver(store, executor, on_event, fresh=execution.fresh).run(specs):
            if isinstance(ending, AvssError):
                if alone:
                    raise ending
                ending = record_failure(store, spec, ending)
                on_event(RunEnded(spec.name, ending))
            runs[id(spec)] = ending
    return [runs[id(spec)] for spec in specs]


class Driver:
    """Runs checkpoints with one executor into one warehouse.

    While shards are measured, the next run is planned (in a thread of the executor's) and results are committed (in a
    thread of the driver's, in the order in which they came).
    """

    def __init__(self, store: Store, executor: Executor, on_event: OnRunEvent, *, fresh: bool = False) -> None:
        self._store, self._executor, self._on_event, self._fresh = store, executor, on_event, fresh
        self._planner = Planner(executor, store)
        self._in_progress: dict[RunShards, tuple[RunSpec, RunInProgress]] = {}
        self._first_names: dict[str, str] = {}  # of the first specs, by run id
        self._endings: dict[str, Run | AvssError] = {}  # of the first specs, by run id
        self._repeats: list[tuple[RunSpec, Run]] = []  # later specs of the same runs, which end as the first ones do
        self._ended: deque[tuple[RunSpec, Run | AvssError]] = deque()
        self._full = False
        self._done = 0
        self._room = threading.BoundedSemaphore(UNCOMMITTED)

    def run(self, specs: Sequence[RunSpec]) -> Iterator[tuple[RunSpec, Run | AvssError]]:
        """Yield each run as it ends: done, skipped, or the error that ended it. Other runs continue.

        Raises:
            AvssError: the executor itself failed.
        """
        try:
            with ThreadPoolExecutor(1, "commit") as self._committer:
                try:
                    with closing(self._executor.run(self._plan_runs(specs))) as outcomes:
                        for shards, outcome in outcomes:
                            self._commit(shards, outcome)
                            while self._ended:
                                yield self._ended.popleft()
                except Exception as error:  # of the executor itself: every run in progress has failed
                    failure = as_failure(error)
                    for shards in list(self._in_progress):
                        self._commit(shards, own_copy(failure))
                    raise failure from error
        except KeyboardInterrupt as stop:
            self._add_note(stop, len(specs))
            raise
        self._end_repeats()
        while self._ended:
            yield self._ended.popleft()

    def _end_repeats(self) -> None:
        """End each spec that asks for the run of an earlier one: as failed with it, or as skipped after it."""
        for spec, run in self._repeats:
            first = self._endings[run.run_id]
            if isinstance(first, AvssError):
                self._ended.append((spec, own_copy(first)))
            else:
                self._end(spec, run, self._first_names[run.run_id])

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
            run_id = ""
            try:
                self._on_event(RunReading(spec.name))
                planned = self._planner.prepare(spec)
                run = planned.run
                if run.run_id in self._first_names:
                    self._repeats.append((spec, run))
                    continue
                stored = {} if self._fresh else self._store.readable_run(run.run_id) or {}
                if stored.get("status") == "done":
                    self._first_names[run.run_id] = spec.name
                    self._end(spec, run)
                    continue
                if self._full:
                    full = StorageFull(
                        f"Not begun: no space left on {self._store.root}.",
                        "Free some space and run the same command again.",
                    )
                    full.run_id = run.run_id
                    raise full
                run_id = run.run_id
                self._first_names[run_id] = spec.name
                running = RunInProgress(planned, self._store, fresh=self._fresh)
            except Exception as error:
                self._fail(spec, run_id, as_failure(error))
                continue
            self._on_event(RunStarted(spec.name, run.num_tokens, running.done_tokens, planned.replica_spec.placement))
            self._in_progress[running.shards] = spec, running
            if running.missing:
                yield running.shards
            else:
                self._commit(running.shards, None)

    def _commit(self, shards: RunShards, outcome: Any) -> None:
        arrived = time.perf_counter()
        self._room.acquire()
        self._committer.submit(self._attempt, shards, outcome, arrived).add_done_callback(
            lambda _: self._room.release()
        )

    def _attempt(self, shards: RunShards, outcome: Any, arrived: float) -> None:
        """Store a result of a run, or None, and finish the run after its last one. An error ends the run."""
        if shards not in self._in_progress:
            return
        spec, running = self._in_progress[shards]
        try:
            if isinstance(outcome, AvssError):
                raise outcome
            if outcome is not None and running.keep(outcome, arrived):
                self._on_event(ShardMeasured(spec.name, outcome.num_tokens))
            if not running.missing:
                self._finish(spec, running)
        except Exception as raised:
            error = as_failure(raised)
            del self._in_progress[shards]
            self._full |= isinstance(error, StorageFull)
            with suppress(AvssError):  # storage that fails; the first error says why
                running.fail(error)
            self._fail(spec, shards.run_id, error)

    def _finish(self, spec: RunSpec, running: RunInProgress) -> None:
        run = running.finish(self._executor.apply)
        del self._in_progress[running.shards]
        self._end(spec, run)

    def _fail(self, spec: RunSpec, run_id: str, error: AvssError) -> None:
        """End a run with an error. Its id is empty if it is unknown."""
        self._endings[run_id] = error
        self._ended.append((spec, error))

    def _end(self, spec: RunSpec, run: Run, repeats: str = "") -> None:
        self._done += 1
        self._endings[run.run_id] = run
        self._on_event(RunEnded(spec.name, run, repeats))
        self._ended.append((spec, run))


def record_failure(store: Store, spec: RunSpec, error: AvssError) -> Run:
    """Return a failed run, after recording it unless it is recorded already, as after its fingerprint was computed."""
    settings = spec.settings.as_dict()
    print_ = fingerprint(model=spec.model, corpus=spec.corpus, settings=settings)
    run_id = error.run_id or f"{slug(Path(spec.model).name)}-{print_[:10]}"
    if not error.run_id:
        with suppress(StorageFull):  # the error is reported all the same
            store.write_run(
                {
                    "run_id": run_id,
                    "fingerprint": print_,
                    "status": "failed",
                    "error": str(error),
                    "created_at": datetime.now(UTC),
                    "model": spec.model,
                    "corpus": spec.corpus,
                    "settings": json.dumps(settings),
                }
            )
    return Run(run_id=run_id, model=spec.model, warehouse=store.root, status="failed", error=str(error))
