"""Scoring of checkpoints: one, several, or those of a job file. A driver plans, measures and stores them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from avss_dist.core.errors import AvssError, RunFailed, StorageFull
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.core.validation import keywords
from avss_dist.core.watch_end import WatchEnd
from avss_dist.corpus.sources import corpus_problems
from avss_dist.models.checkpoint.locate import slug
from avss_dist.partition.catalog import GANGS
from avss_dist.partition.execution import Execution
from avss_dist.requests import ScoreAllRequest, ScoreRequest
from avss_dist.runs.driver import Driver
from avss_dist.runs.events import LogRuns, OnRunEvent, RunEnded, WatchNote
from avss_dist.runs.folder_watch import FolderWatch
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.local import Executor, open_executor
from avss_dist.runs.result import Run
from avss_dist.warehouse.store import Store

__all__ = ["Run", "run_job", "score", "score_all"]


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
    settings = request.settings
    execution = request.execution
    for _, problem in corpus_problems([request.corpus], {settings.chat_template}):
        raise problem
    specs = []
    for model in models:
        specs.append(
            RunSpec(model=model, corpus=request.corpus, settings=settings, execution=execution, title=model, name=model)
        )
    on_event = request.on_event or LogRuns()
    return _run_all(specs, Store(request.warehouse), settings, execution, on_event, alone=alone)


def run_job(job: JobFile, on_event: OnRunEvent | None = None, **options: object) -> list[Run]:
    """Execute the runs of a job file that are not done. A failing run is recorded and does not stop the others.

    Args:
        on_event: receives the events of the runs.
        options: fields of ``execution.Execution`` in place of the job's: ``address``, ``replicas``, ``fresh``, ...

    Raises:
        AvssError: a mistake that concerns all runs, such as an unwritable warehouse or too few devices.
    """
    specs, execution = overridden(job, options)
    return _run_all(specs, Store(job.warehouse), job.settings, execution, on_event or LogRuns())


def watch_job(
    job: JobFile, on_event: OnRunEvent | None, *, end: WatchEnd | None, seconds: float, **options: object
) -> list[Run]:
    """Execute the runs of a job file, then those of checkpoints that come into its globs of folders.

    Args:
        on_event: receives the events of the runs, and remarks of the watch.
        end: end of the watch; without one, it goes on until it is interrupted.
        seconds: time between two looks at the folders.
        options: see `run_job`.

    Returns:
        The runs of the job, then those of checkpoints as they ended.

    Raises:
        AvssError: see `run_job`; no checkpoint came.
    """
    specs, execution = overridden(job, options)
    watch = FolderWatch(_with_execution(job.watched, options), end, seconds)
    tell = on_event or LogRuns()
    tell(WatchNote(watch.globs, watch.describe()))
    try:
        results = _run_all(specs, Store(job.warehouse), job.settings, execution, tell, watch=watch)
    finally:
        for text in watch.remarks():
            tell(WatchNote(watch.globs, text))
    if not results:
        raise RunFailed(
            f"No folder that matches {watch.globs} became a complete checkpoint.",
            f"Check the glob (relative paths start in {Path.cwd()}) and the training.",
        )
    return results


def overridden(job: JobFile, options: dict[str, Any]) -> tuple[list[RunSpec], Execution]:
    """Return the runs of a job and its execution settings, overridden by options."""
    return _with_execution(job.specs, options), replace(job.execution, **options)


def _with_execution(specs: Sequence[RunSpec], options: dict[str, Any]) -> list[RunSpec]:
    """Return runs with some execution settings replaced by options."""
    return [replace(spec, execution=replace(spec.execution, **options)) for spec in specs]


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
    watch: FolderWatch | None = None,
) -> list[Run]:
    """Return the run of every spec, in order. Errors of the warehouse and of the executor come before any work.

    Args:
        alone: raise the error of the one run instead of recording it.
        watch: gives further runs, which follow as they end.
    """
    store.storage.create()
    ended: list[tuple[RunSpec, Run]] = []
    watched = watch.specs if watch is not None else ()
    with closing(executor_for([*specs, *watched], settings, execution)) as executor:
        driver = Driver(store, executor, on_event, fresh=execution.fresh, watch=watch)
        with closing(driver.run(specs)) as endings:
            for spec, ending in endings:
                if isinstance(ending, AvssError):
                    if alone:
                        raise ending
                    result = record_failure(store, spec, ending)
                    on_event(RunEnded(spec.name, result))
                else:
                    result = ending
                ended.append((spec, result))
    return _in_order(specs, ended)


def _in_order(specs: Sequence[RunSpec], ended: Sequence[tuple[RunSpec, Run]]) -> list[Run]:
    """Return the runs of specifications in their order, then all others as they ended."""
    places = {id(spec): place for place, spec in enumerate(specs)}  # Two specifications may be equal.
    in_order = sorted(ended, key=lambda ending: places.get(id(ending[0]), len(places)))
    return [run for _, run in in_order]


def record_failure(store: Store, spec: RunSpec, error: AvssError) -> Run:
    """Return a failed run, after recording it unless it is recorded already, as after its fingerprint was computed."""
    run_id = error.run_id
    if not run_id:
        settings = spec.settings.as_dict()
        run_hash = fingerprint(model=spec.model, corpus=spec.corpus, settings=settings)
        run_id = f"{slug(Path(spec.model).name)}-{run_hash[:10]}"
        run_row = {
            "run_id": run_id,
            "fingerprint": run_hash,
            "status": "failed",
            "error": str(error),
            "created_at": datetime.now(UTC),
            "model": spec.model,
            "corpus": spec.corpus,
            "settings": json.dumps(settings),
        }
        with suppress(StorageFull):  # the error is reported all the same
            store.write_run(run_row)
    return Run(run_id=run_id, model=spec.model, warehouse=store.root, status="failed", error=str(error))
