"""Scoring of checkpoints: one, several, or those of a job file. A driver plans, measures and stores them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from avss_dist.core.errors import AvssError, StorageFull
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.settings import Settings
from avss_dist.core.validation import keywords
from avss_dist.corpus.sources import corpus_problems
from avss_dist.models.checkpoint.locate import slug
from avss_dist.partition.catalog import GANGS
from avss_dist.partition.execution import Execution
from avss_dist.requests import ScoreAllRequest, ScoreRequest
from avss_dist.runs.driver import Driver
from avss_dist.runs.events import LogRuns, OnRunEvent, RunEnded
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
    results: dict[int, Run] = {}  # by the identity of the specification, as two may be equal
    with closing(executor_for(specs, settings, execution)) as executor:
        driver = Driver(store, executor, on_event, fresh=execution.fresh)
        with closing(driver.run(specs)) as endings:
            for spec, ending in endings:
                if isinstance(ending, AvssError):
                    if alone:
                        raise ending
                    result = record_failure(store, spec, ending)
                    on_event(RunEnded(spec.name, result))
                else:
                    result = ending
                results[id(spec)] = result
    return [results[id(spec)] for spec in specs]


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
