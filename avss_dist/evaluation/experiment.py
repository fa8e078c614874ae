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
from avss_dist.evaluation.engine import (
    CellReporter,
    PlannedEvaluation,
    commit,
    failure,
    measure,
    pinned,
    placed,
    plan_evaluation,
    plan_text,
    require_intended,
    require_listable,
)
from avss_dist.evaluation.evaluate import make_task
from avss_dist.evaluation.held_out import refuse_overlap, refuse_repair_text
from avss_dist.evaluation.retention import retained
from avss_dist.executors.base import Executor
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import text_config
from avss_dist.partition.base import Placement
from avss_dist.pruning.ground_truth import layer_truth
from avss_dist.pruning.methods import LEAVE_ONE_OUT, Experiment, Method, methods
from avss_dist.pruning.selection import count_layers
from avss_dist.runs.api import executor_for, run_job, with_options
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.reporter import Reporter
from avss_dist.runs.run import Run
from avss_dist.settings import (
    CHANCE,
    GROUND_TRUTH,
    LOSS,
    MOST_EVALUATIONS,
    RECIPES,
    RELATIVE_THRESHOLDS,
    Settings,
    fingerprint,
)
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Result, Task
from avss_dist.tasks.cells import Cell
from avss_dist.tasks.layer_removal import LeaveOneOut
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

Chosen = tuple[Method, float, tuple[int, ...]]  # a method, the share of layers, and the layers


@dataclass
class Trial:
    """A scored run on its way through an experiment.

    Attributes:
        rows: of the table ``scores``.
        truth: float64[layers], by one of ``settings.GROUND_TRUTH``.
        planned: the evaluation of each task.
        choices: what every method drops of every share.
    """

    run: Run
    checkpoint: Checkpoint
    settings: Settings
    placement: Placement
    rows: Sequence[Mapping[str, Any]]
    corpus: str
    truth: dict[str, Float64] = field(default_factory=dict)
    planned: dict[str, PlannedEvaluation] = field(default_factory=dict)
    choices: list[Chosen] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        """Of the model."""
        return count_layers(self.rows)

    def cells(self) -> list[Cell]:
        """Every task on the whole model, and without every set of layers that is dropped."""
        drops = [(), *(drop for _, _, drop in self.choices)]
        return [cell for one in self.planned.values() for cell in one.cells(drops)]

    def choose(self, experiment: Experiment) -> list[Chosen]:
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
    allow_many: bool = False,
    **options: Any,
) -> tuple[list[Run], list[dict[str, Any]]]:
    """Score the runs of a job, choose, evaluate, compare; what is done is not repeated.

    Args:
        job: with a section ``experiment``.
        reporter, cells: hear how scoring and evaluating go.
        allow_overlap: evaluate on text that layers were scored on, all the same.
        allow_many: go on with more than ``settings.MOST_EVALUATIONS``.
        options: as for `runs.api.run_job`.

    Returns:
        The scored runs, and the rows of ``experiments``, less the columns of RunIdentity but with ``run_id`` and
        ``model``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    experiment = job.experiment
    assert experiment is not None
    specs, execution = with_options(job, options)
    _require_intended(specs, experiment, allow_many=allow_many or experiment.allow_many)
    runs = run_job(job, reporter=reporter or Reporter(), **options)
    tasks = [RedactedURI(task) for task in experiment.tasks]
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
            _prepare(trial, experiment, tasks, warehouse, allow_overlap=allow_overlap)
        wanted = [cell for trial in trials for cell in trial.cells()]
        failed = measure(wanted, store, executor, cells, fresh=execution.fresh)
    results = {one.run_id: commit(one, store) for trial in trials for one in trial.planned.values()}
    if failed:
        raise failure(failed)
    return runs, _commit_rows(trials, results, experiment, tasks, store)


def _require_intended(specs: Sequence[RunSpec], experiment: Experiment, *, allow_many: bool) -> None:
    """Refuse more evaluations than are made unasked, before anything is scored."""
    tasks = len(experiment.tasks)
    choices = [experiment.count_choices(_count_readings(spec.settings)) for spec in specs]
    number = sum(1 + choice for choice in choices) * tasks
    fewer = "Lower `random`, or name fewer `scores`, `shares` or `tasks`."
    require_listable(number, "evaluations", fewer)
    require_intended(
        number,
        MOST_EVALUATIONS,
        f"The experiment makes up to {{}} evaluations (models: {len(specs):,}, sets of layers to drop: "
        f"{max(choices, default=0):,}, tasks: {tasks:,})",
        fewer,
        allow_many=allow_many,
    )


def _count_readings(settings: Settings) -> int:
    """Readings of AVSS that a run with these settings may score."""
    return len(settings.sites) * len(RECIPES) * (len(settings.thresholds) + len(RELATIVE_THRESHOLDS))


def _commit_rows(
    trials: Sequence[Trial],
    results: Mapping[str, list[Result]],
    experiment: Experiment,
    tasks: Sequence[str],
    store: Store,
) -> list[dict[str, Any]]:
    """Write what every choice kept; the rows of all trials."""
    numbers = {key: value for key, value in asdict(experiment).items() if key != "allow_many"}
    name = fingerprint(**numbers | {"tasks": tasks})[:20]
    rows = []
    for trial in trials:
        mine = list(_rows_of_trial(trial, results))
        store.write_experiment(_identity(trial), name, mine)
        rows += [{**row, "run_id": trial.run.run_id, "model": trial.checkpoint.name} for row in mine]
    return rows


def _prepare(
    trial: Trial, experiment: Experiment, tasks: Sequence[str], warehouse: Warehouse, *, allow_overlap: bool
) -> None:
    """Plan the evaluations of a trial, and choose the layers that each method drops."""
    for score in set(experiment.scores) & set(GROUND_TRUTH) - set(trial.truth):
        trial.truth[score] = _known(trial, warehouse, score)
    for name in tasks:
        trial.planned[name] = _plan(trial, name, experiment, warehouse, allow_overlap=allow_overlap)
    trial.choices = trial.choose(experiment)


def _trial(run: Run, spec: RunSpec, warehouse: Warehouse, executor: Executor) -> Trial:
    checkpoint = resolve(spec.model, trust_remote_code=spec.settings.trust_remote_code)
    rows = warehouse.table("scores", run_ids=[run.run_id]).to_pylist()
    settings = pinned(spec.settings, checkpoint, executor.device)
    placement = placed(checkpoint, settings, spec.execution, executor)
    return Trial(run=run, checkpoint=checkpoint, settings=settings, placement=placement, rows=rows, corpus=spec.corpus)


def _plan(
    trial: Trial, name: str, experiment: Experiment, warehouse: Warehouse, *, allow_overlap: bool
) -> PlannedEvaluation:
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
        refuse_repair_text(task, trial.checkpoint)
        refuse_overlap(task, trial.run.run_id, warehouse, trial.checkpoint, corpus=trial.corpus)
    return plan_evaluation(trial.checkpoint, task, settings, trial.placement)


def _leave_one_out(
    trials: Sequence[Trial], store: Store, executor: Executor, reporter: CellReporter | None, *, fresh: bool
) -> None:
    """The loss of every trial without each of its layers, on the text that its scores were measured on."""
    planned = []
    for trial in trials:
        text = plan_text(trial.checkpoint, trial.corpus, trial.settings)
        task = Task(
            name=f"{GROUND_TRUTH[LEAVE_ONE_OUT]}{trial.corpus}",
            parts=tuple(LeaveOneOut(shard) for shard in text.shards),
        )
        planned.append(plan_evaluation(trial.checkpoint, task, trial.settings, trial.placement))
    failed = measure([cell for one in planned for cell in one.cells([()])], store, executor, reporter, fresh=fresh)
    if failed:
        raise failure(failed)
    for trial, one in zip(trials, planned, strict=True):
        values = {result.drop: result.value for result in commit(one, store) if result.metric == LOSS}
        trial.truth[LEAVE_ONE_OUT] = np.array([values.get((layer,), np.nan) for layer in range(trial.num_layers)])


def _known(trial: Trial, warehouse: Warehouse, score: str) -> Float64:
    """What `avss ablate` has measured of every layer."""
    run = warehouse.run(trial.run.run_id)
    assert run is not None
    return layer_truth(warehouse, run, score).by_layer(trial.num_layers)


def guessed_loss(trial: Trial) -> float | None:
    """The loss of a guess among all tokens, in nats per token; None where the vocabulary's size is not known."""
    config = text_config(trial.checkpoint, trust_remote_code=trial.settings.trust_remote_code)
    size = getattr(config.get_text_config(), "vocab_size", None)
    return float(np.log(size)) if size else None


def _rows_of_trial(trial: Trial, results: Mapping[str, Sequence[Result]]) -> Iterator[dict[str, Any]]:
    """Rows of ``experiments``, task by task."""
    guess = guessed_loss(trial)
    for task, one in trial.planned.items():
        mine = [result for result in results[one.run_id] if result.layer is None]
        for row in (*_whole_rows(mine, guess), *_choice_rows(trial.choices, mine)):
            yield {"task": task, "created_at": datetime.now(UTC), **row}


def _whole_rows(results: Sequence[Result], guess: float | None) -> Iterator[dict[str, Any]]:
    """The whole model, and of a loss what a guess makes of it."""
    whole = [_measured(result) for result in results if result.drop == ()]
    if guess is not None and any(row["metric"] == LOSS for row in whole):
        whole.append({"drop": [], "metric": CHANCE, "value": guess, "stderr": None})
    for row in whole:
        yield {**row, "method": WHOLE, "share": 0.0, **_NO_METHOD, "retention": 1.0}


def _choice_rows(choices: Sequence[Chosen], results: Sequence[Result]) -> Iterator[dict[str, Any]]:
    """Every method at every share, beside the whole model."""
    whole = {result.metric: result for result in results if result.drop == ()}
    by_drop: dict[tuple[int, ...], list[Result]] = {}
    for result in results:
        by_drop.setdefault(result.drop, []).append(result)
    for method, share, drop in choices:
        for result in by_drop[drop]:
            kept = retained(whole[result.metric], result)
            yield {
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
