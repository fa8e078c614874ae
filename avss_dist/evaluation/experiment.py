"""Experiments: retention of models without the layers that methods choose.

Every method of `pruning.methods.methods` chooses layers of every run of a job. Each distinct set of layers is evaluated
once on every task and compared with the whole model on the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain, product
from typing import Any

import numpy as np

from avss_dist.analysis.contrast import Strata
from avss_dist.analysis.verdict import WHOLE
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention, Removals
from avss_dist.core.names import CHANCE, CONTRAST, LOSS
from avss_dist.core.registry import GREEDY, MEASURED, RECIPES, SCORES
from avss_dist.core.settings import Settings, fingerprint
from avss_dist.core.text import RedactedURI
from avss_dist.evaluation.events import OnEvent, ignore
from avss_dist.evaluation.repairs import fit_of, fit_repairs, plan_fits, require_changeable
from avss_dist.evaluation.search import greedy_search, removal_losses, search_task
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlacedModel,
    PlannedTask,
    Retention,
    StoredPatch,
    require_intended,
    require_listable,
    results_under,
)
from avss_dist.evaluation.tasks import (
    as_task,
    make_task,
    plan_text,
    refuse_overlap,
    text_of_fit,
    texts_of_repair,
    texts_of_run,
)
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import text_config
from avss_dist.pruning.ground_truth import layer_truth
from avss_dist.pruning.methods import LEAVE_ONE_OUT, Experiment, Method, methods
from avss_dist.pruning.plan import layer_list
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.pruning.repair.repair import Repair
from avss_dist.pruning.selection import Reading, count_layers
from avss_dist.requests import JobRequest
from avss_dist.runs.api import executor_for, overridden, run_job
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.run import Run
from avss_dist.stats.contrast import contrast
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.scores import RELATIVE_THRESHOLDS, Threshold
from avss_dist.tasks.base import Result, Task
from avss_dist.tasks.layer_removal import LeaveOneOut
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

MOST_EVALUATIONS = 10_000  # evaluations of a model on a task that an experiment makes without `allow_many`
Layers = tuple[int, ...]
_READING = ("site", "recipe", "threshold", "threshold_kind")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model that an experiment evaluates, and the method by which it was made.

    Attributes:
        method: choice of the layers; None for the whole model.
        intervention: change of the model.
        share: share of the layers that are removed.
        repair: name of the repair; None without one.
    """

    method: Method | None = None
    intervention: Intervention = NO_INTERVENTION
    share: float = 0.0
    repair: str | None = None

    def row(
        self,
        metric: str,
        value: float,
        stderr: float | None = None,
        retention: tuple[float | None, float | None, float | None] = (None, None, None),
    ) -> dict[str, Any]:
        """Return a row of ``experiments``, without the task and the columns of RunIdentity.

        Args:
            retention: the retention, and the lower and upper end of its interval.
        """
        method = self.method
        reading: Sequence[Any] = (method and method.reading) or [None] * len(_READING)
        retained, low, high = retention
        return {
            **self.intervention.key.row(),
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "method": method.label if method else WHOLE,
            "share": self.share,
            "score": method and method.score,
            **dict(zip(_READING, reading, strict=True)),
            "control": method and method.control,
            "seed": method and method.seed,
            "repair": self.repair,
            "retention_low": low,
            "retention_high": high,
            "retention": retained,
        }

    def rows(self, results: Sequence[Result]) -> Iterator[dict[str, Any]]:
        """Yield the row of every metric of a task.

        Args:
            results: results of the task, those of the whole model included.
        """
        whole = {result.metric: result for result in results_under(results)}
        for result in results_under(results, self.intervention.key):
            yield self.row(result.metric, result.value, result.stderr, self._retention(whole, result))

    def _retention(
        self, whole: Mapping[str, Result], result: Result
    ) -> tuple[float | None, float | None, float | None]:
        if self.method is None:
            return 1.0, None, None
        if result.metric not in whole:
            return None, None, None
        retention = Retention.of(whole[result.metric], result)
        return retention.value, retention.low, retention.high


@dataclass
class Trial:
    """State of a scored run in an experiment.

    Attributes:
        model: checkpoint of the run.
        rows: rows of the table ``scores``.
        truth: measurements of the layers, float64[layers], by a name of ``registry.MEASURED``.
        searched: layers that a search chose, by method and share.
        contrasts: contrasts of the layers on paired text, float64[layers], by reading.
        planned: tasks by name.
        choices: method, share of layers, and layers that the method drops at this share.
        fits: task of fitting each repair except `pruning.repair.registry.NO_REPAIR`.
        patches: fitted patches, by the fit's id and the dropped layers.
    """

    run: Run
    spec: RunSpec
    model: PlacedModel
    rows: Sequence[Mapping[str, Any]]
    corpus: str
    truth: dict[str, Float64] = field(default_factory=dict)
    searched: dict[tuple[Method, float], Layers] = field(default_factory=dict)
    contrasts: dict[Reading, Float64] = field(default_factory=dict)
    planned: dict[str, PlannedTask] = field(default_factory=dict)
    choices: list[tuple[Method, float, Layers]] = field(default_factory=list)
    fits: dict[str, PlannedTask] = field(default_factory=dict)
    patches: Mapping[tuple[str, Removals], StoredPatch] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Checkpoint:
        """Checkpoint of the run."""
        return self.model.checkpoint

    @property
    def settings(self) -> Settings:
        """Settings of the run, with every ``auto`` decided."""
        return self.model.settings

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return count_layers(self.rows)

    @property
    def drops(self) -> list[Layers]:
        """Distinct sets of layers that are dropped."""
        return list(dict.fromkeys(drop for *_, drop in self.choices))

    @property
    def identity(self) -> RunIdentity:
        """Identity of the run."""
        name, revision = self.checkpoint.name, self.checkpoint.revision
        return RunIdentity(run_id=self.run.run_id, model=name, revision=revision, family=self.rows[0]["family"])

    def reading(self, maximum: int | None) -> PlacedModel:
        """Return the model with at most ``maximum`` rows of a text; None keeps the limit of the run."""
        limits = [limit for limit in (self.settings.max_sequences, maximum) if limit]
        return self.model.reading(max_sequences=min(limits, default=None))

    def stored_run(self, warehouse: Warehouse) -> dict[str, Any]:
        """Return the row of ``runs``."""
        row = warehouse.run(self.run.run_id)
        assert row is not None
        return row

    def choose(self, experiment: Experiment) -> None:
        """Choose the layers that every method drops at every share."""
        chosen = product(methods(experiment, self.rows), experiment.shares)
        self.choices = [(method, share, self._drop(method, share)) for method, share in chosen]

    def _drop(self, method: Method, share: float) -> Layers:
        if (method, share) in self.searched:
            return self.searched[method, share]
        choice = method.choice(share)
        if method.score == CONTRAST and method.reading is not None:
            return choice.drop(-self.contrasts[method.reading])
        return choice.drop(choice.scores(self.rows, self.truth))

    def candidates(self, experiment: Experiment) -> Iterator[Candidate]:
        """Yield the whole model, and the model without each choice of layers, by repair."""
        yield Candidate()
        for (method, share, drop), repair in product(self.choices, experiment.repairs):
            fit = self.fits.get(repair)
            patch = self.patches.get((fit.run_id(), drop)) if fit else None
            intervention, name = Intervention(removed=drop, patch=patch), None if repair == NO_REPAIR else repair
            yield Candidate(method=method, intervention=intervention, share=share, repair=name)

    def result_rows(
        self, experiment: Experiment, measured: Mapping[PlannedTask, Sequence[Result]]
    ) -> Iterator[dict[str, Any]]:
        """Yield the rows of ``experiments``, without the columns of RunIdentity."""
        guess = self._guessed_loss()
        for (task, planned), candidate in product(self.planned.items(), self.candidates(experiment)):
            rows = list(candidate.rows(measured[planned]))
            if candidate.method is None and guess is not None and any(row["metric"] == LOSS for row in rows):
                rows.append(candidate.row(CHANCE, guess, retention=(1.0, None, None)))
            for row in rows:
                yield {"task": task, "created_at": datetime.now(UTC), **row}

    def _guessed_loss(self) -> float | None:
        """Return the loss of a guess among all tokens, in nats per token; None for a vocabulary of unknown size."""
        config = text_config(self.checkpoint, trust_remote_code=self.settings.trust_remote_code)
        size = getattr(config.get_text_config(), "vocab_size", None)
        return float(np.log(size)) if size else None


def run_experiment(
    job: JobFile, request: JobRequest, on_event: OnEvent | None = None
) -> tuple[list[Run], list[dict[str, Any]]]:
    """Score the runs of a job, choose layers, evaluate, and compare. Finished work is not repeated.

    Args:
        job: job with a section ``experiment``.
        request: permissions, and fields of ``settings.Execution`` in place of the job's.
        on_event: receives the events of scoring and of evaluating.

    Returns:
        The scored runs, and the rows of ``experiments``, of whose RunIdentity only ``run_id`` and ``model`` are given.

    Raises:
        AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
    """
    if (experiment := job.experiment) is None:
        raise ConfigError(f"{job.path} has no section 'experiment'.", "`run_job` runs what it asks for.")
    specs, execution = overridden(job, request.given)
    _require_intended(specs, experiment, allow_many=request.allow_many or experiment.allow_many)
    for spec in specs if _fitted(experiment) else ():
        require_changeable(spec.execution.partition)
    runs = run_job(job, on_event or ignore, **request.given)
    tasks = [RedactedURI(task) for task in experiment.tasks]
    store, warehouse = Store(job.warehouse), Warehouse(job.warehouse)
    with closing(executor_for(specs, job.settings, execution)) as executor:
        session = EvaluationSession(store, executor, execution, on_event)
        trials = [
            _trial(run, spec, warehouse, session)
            for run, spec in zip(runs, specs, strict=True)
            if run.status != "failed"
        ]
        _read_measured(trials, experiment, warehouse)
        _plan_work(trials, experiment, tasks, warehouse, allow_overlap=request.allow_overlap)
        measured = _measure(trials, experiment, session)
        rows = _write(trials, experiment, tasks, measured, store)
    return runs, rows


def _write(
    trials: Sequence[Trial],
    experiment: Experiment,
    tasks: Sequence[str],
    measured: Mapping[PlannedTask, Sequence[Result]],
    store: Store,
) -> list[dict[str, Any]]:
    """Write the rows of ``experiments``, and return them with the id and the model of their runs."""
    numbers = {key: value for key, value in asdict(experiment).items() if key != "allow_many"}
    name = fingerprint(**numbers | {"tasks": tasks})[:20]
    rows = []
    for trial in trials:
        results = list(trial.result_rows(experiment, measured))
        store.write_rows("experiments", trial.identity, name, results)
        rows += [{**row, "run_id": trial.run.run_id, "model": trial.checkpoint.name} for row in results]
    return rows


def _measure(
    trials: Sequence[Trial], experiment: Experiment, session: EvaluationSession
) -> dict[PlannedTask, list[Result]]:
    """Choose layers, fit repairs, and measure every task of every trial with all candidates."""
    if experiment.leave_one_out:
        _leave_one_out(trials, session)
    _search(trials, experiment, session)
    for trial in trials:
        trial.choose(experiment)
    _fit_repairs(trials, session)
    work: list[tuple[PlannedTask, Sequence[Intervention]]] = []
    for trial in trials:
        applied = [candidate.intervention for candidate in trial.candidates(experiment)]
        work += [(planned, applied) for planned in trial.planned.values()]
    return session.measure(work)


def describe_size(job: JobFile) -> str:
    """Return a sentence with the maximum number of evaluations of an experiment, and its factors."""
    assert job.experiment is not None
    number, text = _size(job.specs, job.experiment)
    return text.format(f"{number:,}")


def _size(specs: Sequence[RunSpec], experiment: Experiment) -> tuple[int, str]:
    """Return the maximum number of evaluations, and a sentence with a place for it."""
    tasks, repairs = len(experiment.tasks), len(experiment.repairs)
    choices = [experiment.count_choices(_count_readings(spec.settings)) for spec in specs]
    return sum(1 + choice * repairs for choice in choices) * tasks, (
        f"The experiment makes up to {{}} evaluations (models: {len(specs):,}, sets of layers to drop: "
        f"{max(choices, default=0):,}, repairs: {repairs:,}, tasks: {tasks:,})"
    )


def _require_intended(specs: Sequence[RunSpec], experiment: Experiment, *, allow_many: bool) -> None:
    """Refuse more than `MOST_EVALUATIONS` evaluations unless ``allow_many`` is set, before anything is scored."""
    number, text = _size(specs, experiment)
    fewer = "Lower `random`, or name fewer `scores`, `shares`, `repairs` or `tasks`."
    require_listable(number, "evaluations", fewer)
    require_intended(number, MOST_EVALUATIONS, text, fewer, allow_many=allow_many)


def _count_readings(settings: Settings) -> int:
    """Return the maximum number of readings of AVSS of a run with these settings."""
    return len(settings.sites) * len(RECIPES) * (len(settings.thresholds) + len(RELATIVE_THRESHOLDS))


def _plan_work(
    trials: Sequence[Trial], experiment: Experiment, tasks: Sequence[str], warehouse: Warehouse, *, allow_overlap: bool
) -> None:
    """Plan evaluations and fits; refuse texts of both and of a trial's scores that overlap."""
    for trial in trials:
        trial.planned = {name: _plan(trial.model, name, experiment) for name in tasks}
        if repairs := _fitted(experiment):
            trial.fits = _plan_fits(trial, experiment, repairs)
        if not allow_overlap:
            _refuse_overlaps(trial, experiment, warehouse)


def _plan_fits(trial: Trial, experiment: Experiment, repairs: Sequence[str]) -> dict[str, PlannedTask]:
    layers, _ = layer_list(trial.rows, trial.checkpoint.name)
    settings = replace(
        trial.settings, max_sequences=experiment.repair_max_sequences, skip_sequences=experiment.repair_skip_sequences
    )
    wanted = [Repair(by=by, corpora=experiment.repair_corpora, settings=settings) for by in repairs]
    return plan_fits(trial.model, layers, wanted)


def _fitted(experiment: Experiment) -> list[str]:
    """Return the repairs that are fitted, each once."""
    return [repair for repair in dict.fromkeys(experiment.repairs) if repair != NO_REPAIR]


def _refuse_overlaps(trial: Trial, experiment: Experiment, warehouse: Warehouse) -> None:
    """Refuse tasks on text that was scored on or is fitted on, and fits on text that was scored on."""
    checkpoint, run_id, skipped = trial.checkpoint, trial.run.run_id, experiment.repair_skip_sequences
    texts = [text for fit in [*trial.fits.values()][:1] for text in fit_of(fit).texts]
    code = trial.settings.trust_remote_code
    fitted = (text_of_fit(text, skipped, checkpoint, trust_remote_code=code) for text in texts)
    scored = partial(texts_of_run, warehouse, run_id, checkpoint, corpus=trial.corpus)
    tasks = [planned.task for planned in trial.planned.values()]
    refuse_overlap(tasks, chain(texts_of_repair(checkpoint), scored(), fitted))
    refuse_overlap(map(as_task, texts), scored(skip_option="repair_skip_sequences"))


def _read_measured(trials: Sequence[Trial], experiment: Experiment, warehouse: Warehouse) -> None:
    """Read the measurements of `avss ablate` and the contrasts by which layers of the trials are chosen."""
    scores = set(experiment.scores)
    measured = scores & set(MEASURED) - ({LEAVE_ONE_OUT} if experiment.leave_one_out else set())
    for trial in trials:
        run = trial.stored_run(warehouse)
        trial.truth |= {by: layer_truth(warehouse, run, by).by_layer(trial.num_layers) for by in measured}
        readings = {method.reading for method in methods(experiment, trial.rows) if method.score == CONTRAST}
        trial.contrasts = {reading: _contrast(trial, warehouse, reading) for reading in readings if reading}


def _trial(run: Run, spec: RunSpec, warehouse: Warehouse, session: EvaluationSession) -> Trial:
    checkpoint = resolve(spec.model, trust_remote_code=spec.settings.trust_remote_code)
    rows = warehouse.table("scores", run_ids=[run.run_id]).to_pylist()
    model = session.place(checkpoint, spec.settings, spec.execution)
    return Trial(run=run, spec=spec, model=model, rows=rows, corpus=spec.corpus)


def _plan(model: PlacedModel, name: str, experiment: Experiment) -> PlannedTask:
    model = model.reading(max_sequences=experiment.max_sequences, skip_sequences=experiment.skip_sequences)
    task = make_task(
        model.checkpoint,
        name,
        model.settings,
        skip_questions=experiment.skip_questions,
        limit=experiment.limit,
        num_fewshot=experiment.num_fewshot,
    )
    return model.plan(task)


def _leave_one_out(trials: Sequence[Trial], session: EvaluationSession) -> None:
    """Measure the loss of every trial without each of its layers, on the text that its scores were measured on."""
    planned = []
    for trial in trials:
        text = plan_text(trial.checkpoint, trial.corpus, trial.settings)
        name = f"{SCORES[LEAVE_ONE_OUT].task}{trial.corpus}"
        planned.append(trial.model.plan(Task(name=name, parts=tuple(map(LeaveOneOut, text.shards)))))
    results = session.measure((task, [NO_INTERVENTION]) for task in planned)
    for trial, task in zip(trials, planned, strict=True):
        values = {result.removed: result.value for result in results[task] if result.metric == LOSS}
        trial.truth[LEAVE_ONE_OUT] = np.array([values.get((layer,), np.nan) for layer in range(trial.num_layers)])


def _search(trials: Sequence[Trial], experiment: Experiment, session: EvaluationSession) -> None:
    """Search sets of layers of every trial, on the text that its scores were measured on."""
    for trial in trials if GREEDY in experiment.scores else ():
        model = trial.reading(experiment.search_max_sequences)
        planned = model.plan(search_task(trial.checkpoint, trial.corpus, model.settings))
        losses = removal_losses(session, planned)
        searches = [method for method in methods(experiment, trial.rows) if method.score == GREEDY]
        with session.keeping_workers():
            for method, share in product(searches, experiment.shares):
                choice, layers = method.choice(share), trial.num_layers
                removed, _ = greedy_search(choice.unprotected(layers), choice.number(layers), losses)
                trial.searched[method, share] = removed
        session.results(planned)


def _fit_repairs(trials: Sequence[Trial], session: EvaluationSession) -> None:
    """Fit every repair of every trial to each of its sets of layers."""
    wanted = [(fit, trial.drops) for trial in trials for fit in trial.fits.values()]
    if wanted:
        patches = fit_repairs(session, wanted)
        for trial in trials:
            trial.patches = patches


def _contrast(trial: Trial, warehouse: Warehouse, reading: Reading) -> Float64:
    """Return the contrast of every layer of a run on paired text, NaN for a layer without it."""
    site, recipe, value, kind = reading
    strata = Strata.of_run(warehouse, trial.stored_run(warehouse), site)
    values = np.full(trial.num_layers, np.nan)
    (values[[*strata.layers]],) = contrast(*strata.both_sides(recipe, Threshold(value=value, kind=kind)))
    return values
