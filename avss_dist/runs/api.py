"""Score checkpoints: one, several, or those of a job file; the same driver does the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

from avss_dist.errors import AvssError, ConfigError
from avss_dist.executors.base import Executor
from avss_dist.executors.open import open_executor
from avss_dist.options import ScoringOptions, with_options
from avss_dist.registry import GANGS
from avss_dist.runs.corpora import corpus_problems
from avss_dist.runs.driver import Driver, Ending, record_failure
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.reporter import LoggingReporter, Reporter, Reporters
from avss_dist.runs.run import Run
from avss_dist.runs.trackers import Tracker
from avss_dist.settings import DEFAULT_WAREHOUSE, Execution, Settings, split_options
from avss_dist.warehouse.store import Store

__all__ = ["Reporter", "Run", "run_job", "score", "score_all", "split_options"]


@with_options(ScoringOptions)
def score(
    model: str | Path,
    *,
    corpus: str,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    reporter: Reporter | None = None,
    **options: Unpack[ScoringOptions],
) -> Run:
    """Score one checkpoint and keep the result in a warehouse; a run that is done is not repeated.

    Args:
        model: hub id (``org/name@revision``), folder, or ``.gguf`` file.
        corpus: as `corpus.sources` has them: ``file.txt``, ``file.jsonl[:field]``, ``hf:...``, ``wikitext2``, ...
        warehouse: where the result is kept, a folder or URI.
        reporter: notified as the work goes on; `LoggingReporter` by default.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a failed run (`RunFailed`); what was measured is kept.
    """
    settings, execution = split_options(dict(options))
    _require_readable(corpus, settings)
    name = str(model)
    spec = RunSpec(model=name, corpus=corpus, settings=settings, execution=execution, title=name, name=name)
    ((_, ending),) = _drive([spec], _warehouse(warehouse), settings, execution, reporter or LoggingReporter())
    if isinstance(ending, AvssError):
        raise ending
    return ending


@with_options(ScoringOptions)
def score_all(
    models: Sequence[str],
    *,
    corpus: str,
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    reporter: Reporter | None = None,
    **options: Unpack[ScoringOptions],
) -> list[Run]:
    """Score several checkpoints with one pool of workers; one that fails is recorded and does not stop the others.

    Raises:
        AvssError: a mistake that concerns all of them, such as an unknown setting or an unwritable warehouse.
    """
    settings, execution = split_options(dict(options))
    if repeated := [model for model, times in Counter(models).items() if times > 1]:
        raise ConfigError(f"'{repeated[0]}' is there twice.", "Name each model once.")
    _require_readable(corpus, settings)
    specs = [
        RunSpec(model=model, corpus=corpus, settings=settings, execution=execution, title=model, name=model)
        for model in models
    ]
    return _all(specs, _warehouse(warehouse), settings, execution, reporter or LoggingReporter())


def run_job(job: JobFile, *, reporter: Reporter | None = None, **options: Any) -> list[Run]:
    """Run what a job file asks for and is not done yet; a run that fails is recorded and does not stop the others.

    Args:
        reporter: notified as the work goes on.
        options: fields of ``settings.Execution`` in place of the job's: ``address``, ``replicas``, ``fresh``, ...

    Raises:
        AvssError: a mistake that concerns all runs, such as an unwritable warehouse or too few devices.
    """
    specs, execution = overridden(job, options)
    return _all(specs, Store(job.warehouse), job.settings, execution, reporter or LoggingReporter())


def overridden(job: JobFile, options: dict[str, Any]) -> tuple[list[RunSpec], Execution]:
    """The runs of a job, and how it runs, with options in place of its own."""
    specs = [replace(spec, execution=replace(spec.execution, **options)) for spec in job.specs]
    return specs, replace(job.execution, **options)


def _all(
    specs: Sequence[RunSpec], store: Store, settings: Settings, execution: Execution, reporter: Reporter
) -> list[Run]:
    """Every run in the order of its spec; one that fails is recorded."""
    runs: dict[int, Run] = {}
    for spec, ending in _drive(specs, store, settings, execution, reporter):
        if isinstance(ending, AvssError):
            ending = record_failure(store, spec, ending)
            reporter.finished(spec.name, ending)
        runs[id(spec)] = ending
    return [runs[id(spec)] for spec in specs]


def _drive(
    specs: Sequence[RunSpec], store: Store, settings: Settings, execution: Execution, reporter: Reporter
) -> Iterator[Ending]:
    """What all runs share, checked before any work: the warehouse, the workers, who are closed after it."""
    with ExitStack() as stack:
        if execution.tracker:
            reporter = Reporters(reporter, stack.enter_context(closing(Tracker(execution.tracker))))
        store.create()
        executor = stack.enter_context(closing(executor_for(specs, settings, execution)))
        yield from Driver(store, executor, reporter, fresh=execution.fresh).run(specs)


def executor_for(specs: Sequence[RunSpec], settings: Settings, execution: Execution) -> Executor:
    """The requested executor; a gang among the runs needs one of several processes."""
    gang = next((spec.execution for spec in specs if spec.execution.partition in GANGS), execution)
    return open_executor(gang, settings)


def _warehouse(name: str | Path) -> Store:
    if not str(name):
        raise ConfigError("`warehouse` is empty.", "Name a folder, or an s3://, gs://, hdfs:// URI.")
    return Store(name)


def _require_readable(corpus: str, settings: Settings) -> None:
    """Fail now, not for every model, where the corpus cannot be read."""
    for _, problem in corpus_problems([corpus], {settings.chat_template}):
        raise problem
