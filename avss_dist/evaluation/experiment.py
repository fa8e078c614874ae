"""The experiment: does a model keep what it can do without the layers that a score calls unimportant?

Every method of `methods` chooses layers of every run of a job; each distinct set of layers is evaluated once on every
task, on the cells of `evaluate`, and compared with the whole model on the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from avss_dist.analysis.verdict import WHOLE
from avss_dist.evaluation.evaluate import (
    Asked,
    CellReporter,
    ask,
    commit,
    failure,
    make_task,
    measure,
    pinned,
    plan_text,
)
from avss_dist.evaluation.held_out import refuse_overlap
from avss_dist.evaluation.retention import retained
from avss_dist.executors.base import Executor
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.pruning.ground_truth import layer_truth
from avss_dist.pruning.methods import LEAVE_ONE_OUT, Experiment, Method, methods
from avss_dist.pruning.selection import count_layers
from avss_dist.runs.api import executor_for, run_job, with_options
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.reporter import Reporter
from avss_dist.runs.run import Run
from avss_dist.settings import GROUND_TRUTH, LOSS, Settings, fingerprint
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Result, Task, require_evaluates
from avss_dist.tasks.layer_removal import LeaveOneOut
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

Chosen = tuple[Method, float, tuple[int, ...]]  # a method, the share of layers, and the layers


@dataclass
class Trial:
    """A scored run on its way through an experiment."""

    run: Run
    checkpoint: Checkpoint
    settings: Settings
    rows: Sequence[Mapping[str, Any]]
    corpus: str
    truth: dict[str, Float64] = field(default_factory=dict)  # float64[layers], by one of `config.GROUND_TRUTH`

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return count_layers(self.rows)

    def chosen(self, experiment: Experiment) -> list[Chosen]:
        """What every method drops of every share."""
        return [
            (method, share, choice.drop(choice.scores(self.rows, self.truth)))
            for method in methods(experiment, self.rows)
            for share in experiment.shares
            for choice in [method.choice(share)]
        ]


def run_experiment(
    job: JobFile,
    *,
    reporter: Reporter | None = None,
    cells: CellReporter | None = None,
    allow_overlap: bool = False,
    **options: Any,
) -> tuple[list[Run], list[dict[str, Any]]]:
    """Score the runs of a job, choose, evaluate, compare; what is done is not repeated.

    Args:
        job: with a section ``experiment``.
        reporter, cells: told how scoring and evaluating go.
        allow_overlap: evaluate on text that layers were scored on, all the same.
        options: as for `run.run_job`.

    Returns:
        The scored runs, and the rows of ``experiments``, less the columns of RunIdentity but with ``run_id`` and
        ``model``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    experiment = job.experiment
    assert experiment is not None
    specs, execution = with_options(job, options)
    for spec in specs:
        require_evaluates(spec.execution.partition)
    tasks = [RedactedURI(task) for task in experiment.tasks]
    runs = run_job(job, reporter=reporter or Reporter(), **options)
    store, warehouse = Store(job.warehouse), Warehouse(job.warehouse)
    with closing(executor_for(specs, job.settings, execution)) as executor:
        trials = [
            _trial(run, spec, warehouse, executor)
            for run, spec in zip(runs, specs, strict=True)
            if run.status != "failed"
        ]
        if experiment.leave_one_out:
            _leave_one_out(trials, store, executor, cells, fresh=execution.fresh)
        for trial in trials:
            for score in set(experiment.scores) & set(GROUND_TRUTH) - set(trial.truth):
                trial.truth[score] = _known(trial, warehouse, score)
        asked = {}
        for trial in trials:
            for name in tasks:
                asked[trial.run.run_id, name] = _ask(trial, name, experiment, warehouse, allow_overlap=allow_overlap)
        chosen = {trial.run.run_id: trial.chosen(experiment) for trial in trials}
        wanted = [
            cell
            for (run_id, _), one in asked.items()
            for cell in one.cells([(), *(drop for _, _, drop in chosen[run_id])])
        ]
        failed = measure(wanted, store, executor, cells, fresh=execution.fresh)
    found = {one.run_id: commit(one, store) for one in asked.values()}
    if failed:
        raise failure(failed)
    rows = []
    for trial in trials:
        mine = [
            row
            for name in tasks
            for row in _rows(chosen[trial.run.run_id], name, found[asked[trial.run.run_id, name].run_id])
        ]
        store.write_experiment(_identity(trial), fingerprint(**asdict(experiment) | {"tasks": tasks})[:20], mine)
        rows += [{**row, "run_id": trial.run.run_id, "model": trial.checkpoint.name} for row in mine]
    return runs, rows


def _trial(run: Run, spec: RunSpec, warehouse: Warehouse, executor: Executor) -> Trial:
    checkpoint = resolve(spec.model, trust_remote_code=spec.settings.trust_remote_code)
    rows = warehouse.table("scores", run_ids=[run.run_id]).to_pylist()
    settings = pinned(spec.settings, checkpoint, executor.device)
    return Trial(run=run, checkpoint=checkpoint, settings=settings, rows=rows, corpus=spec.corpus)


def _ask(trial: Trial, name: str, experiment: Experiment, warehouse: Warehouse, *, allow_overlap: bool) -> Asked:
    settings = replace(trial.settings, max_sequences=experiment.max_sequences)
    task = make_task(
        trial.checkpoint,
        name,
        settings,
        skip_sequences=experiment.skip_sequences,
        limit=experiment.limit,
        num_fewshot=experiment.num_fewshot,
    )
    if not allow_overlap:
        refuse_overlap(task, trial.run.run_id, warehouse, trial.checkpoint)
    return ask(trial.checkpoint, task, settings)


def _leave_one_out(
    trials: Sequence[Trial], store: Store, executor: Executor, reporter: CellReporter | None, *, fresh: bool
) -> None:
    """The loss of every trial without each of its layers, on the text that its scores were measured on."""
    asked = []
    for trial in trials:
        text = plan_text(trial.checkpoint, trial.corpus, trial.settings)
        task = Task(
            name=f"{GROUND_TRUTH[LEAVE_ONE_OUT]}{trial.corpus}",
            parts=tuple(LeaveOneOut(shard) for shard in text.shards),
        )
        asked.append(ask(trial.checkpoint, task, trial.settings))
    failed = measure([cell for one in asked for cell in one.cells([()])], store, executor, reporter, fresh=fresh)
    if failed:
        raise failure(failed)
    for trial, one in zip(trials, asked, strict=True):
        values = {result.drop: result.value for result in commit(one, store) if result.metric == LOSS}
        trial.truth[LEAVE_ONE_OUT] = np.array([values.get((layer,), np.nan) for layer in range(trial.num_layers)])


def _known(trial: Trial, warehouse: Warehouse, score: str) -> Float64:
    """What `avss ablate` has measured of every layer."""
    run = warehouse.run(trial.run.run_id)
    assert run is not None
    return layer_truth(warehouse, run, score).by_layer(trial.num_layers)


def _rows(chosen: Sequence[Chosen], task: str, found: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Rows of ``experiments`` for one task: the whole model, then every method at every share."""
    whole = {result.metric: result for result in found if result.drop == () and result.layer is None}
    by_drop: dict[tuple[int, ...], list[Result]] = {}
    for result in found:
        if result.layer is None:
            by_drop.setdefault(result.drop, []).append(result)
    common = {"task": task, "created_at": datetime.now(UTC)}
    for result in whole.values():
        yield {**common, **_measured(result), "method": WHOLE, "share": 0.0, **_NO_METHOD, "retention": 1.0}
    for method, share, drop in chosen:
        for result in by_drop[drop]:
            kept = retained(whole[result.metric], result)
            yield {
                **common,
                **_measured(result),
                "method": method.label,
                "share": share,
                "score": method.score,
                **dict(zip(_READING, method.reading or [None] * len(_READING), strict=True)),
                "control": method.control,
                "seed": method.seed,
                "retention": kept.value,
                "retention_low": kept.low,
                "retention_high": kept.high,
            }


_READING = ("site", "recipe", "threshold", "threshold_kind")
_NO_METHOD = dict.fromkeys(("score", *_READING, "control", "seed", "retention_low", "retention_high"))


def _measured(result: Result) -> dict[str, Any]:
    return {
        "drop": list(result.drop),
        "metric": result.metric,
        "value": result.value,
        "stderr": result.stderr,
    }


def _identity(trial: Trial) -> RunIdentity:
    of = trial.checkpoint
    return RunIdentity(run_id=trial.run.run_id, model=of.name, revision=of.revision, family=trial.rows[0]["family"])
