"""Scoring of checkpoints: one, several, or those of a job file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from avss_dist.core.errors import AvssError
from avss_dist.core.registry import GANGS
from avss_dist.core.settings import Execution, Settings
from avss_dist.core.validation import keywords
from avss_dist.corpus.sources import corpus_problems
from avss_dist.executors import Executor
from avss_dist.executors.local import open_executor
from avss_dist.requests import ScoreAllRequest, ScoreRequest
from avss_dist.runs.driver import Driver, Ending, record_failure
from avss_dist.runs.events import LogRuns, OnRunEvent, RunEnded
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.run import Run
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
    settings, execution, on_event = request.settings, request.execution, request.on_event or LogRuns()
    for _, problem in corpus_problems([request.corpus], {settings.chat_template}):
        raise problem
    specs = [
        RunSpec(model=model, corpus=request.corpus, settings=settings, execution=execution, title=model, name=model)
        for model in models
    ]
    store = Store(request.warehouse)
    if not alone:
        return _all(specs, store, settings, execution, on_event)
    ((_, ending),) = _drive(specs, store, settings, execution, on_event)
    if isinstance(ending, AvssError):
        raise ending
    return [ending]


def run_job(job: JobFile, on_event: OnRunEvent | None = None, **options: Any) -> list[Run]:
    """Execute the runs of a job file that are not done. A failing run is recorded and does not stop the others.

    Args:
        on_event: receives the events of the runs.
        options: fields of ``settings.Execution`` in place of the job's: ``address``, ``replicas``, ``fresh``, ...

    Raises:
        AvssError: a mistake that concerns all runs, such as an unwritable warehouse or too few devices.
    """
    specs, execution = overridden(job, options)
    return _all(specs, Store(job.warehouse), job.settings, execution, on_event or LogRuns())


def overridden(job: JobFile, options: dict[str, Any]) -> tuple[list[RunSpec], Execution]:
    """Return the runs of a job and its execution settings, overridden by options."""
    specs = [replace(spec, execution=replace(spec.execution, **options)) for spec in job.specs]
    return specs, replace(job.execution, **options)


def _all(
    specs: Sequence[RunSpec], store: Store, settings: Settings, execution: Execution, on_event: OnRunEvent
) -> list[Run]:
    """Return the run of every spec, in order. A failing run is recorded."""
    runs: dict[int, Run] = {}
    for spec, ending in _drive(specs, store, settings, execution, on_event):
        if isinstance(ending, AvssError):
            ending = record_failure(store, spec, ending)
            on_event(RunEnded(spec.name, ending))
        runs[id(spec)] = ending
    return [runs[id(spec)] for spec in specs]


def _drive(
    specs: Sequence[RunSpec], store: Store, settings: Settings, execution: Execution, on_event: OnRunEvent
) -> Iterator[Ending]:
    """Create the warehouse and the executor, whose errors come before any work, and yield each run as it ends."""
    store.create()
    with closing(executor_for(specs, settings, execution)) as executor:
        yield from Driver(store, executor, on_event, fresh=execution.fresh).run(specs)


def executor_for(specs: Sequence[RunSpec], settings: Settings, execution: Execution) -> Executor:
    """Open the executor for runs. If a run's partition is a gang, the executor must have several processes."""
    gang = next((spec.execution for spec in specs if spec.execution.partition in GANGS), execution)
    return open_executor(gang, settings)
