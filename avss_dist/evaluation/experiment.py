"""Experiments on whether models keep their abilities without the layers that a score calls unimportant.

Every method of `methods` chooses layers of every run of a job; each distinct set of layers is evaluated once on every
task, on the cells of `evaluate`, and compared with the whole model on the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from avss_dist.analysis.sparsity_plans import MeasuredMaps
from avss_dist.analysis.strata import Strata
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import NO_INTERVENTION, whole_layers
from avss_dist.core.names import CONTRAST, LOSS
from avss_dist.core.registry import INTERACTIONS, MEASURED, RECIPES, SCORES, SEARCHES
from avss_dist.core.settings import INPUTS, Settings, fingerprint
from avss_dist.core.text import RedactedURI
from avss_dist.evaluation.evaluate import require_effect
from avss_dist.evaluation.events import OnEvent
from avss_dist.evaluation.held_out import as_task, refuse_overlap, text_of_fit, texts_of_repair, texts_of_run
from avss_dist.evaluation.repairs import fit_of, fit_repairs, plan_fits, require_changeable
from avss_dist.evaluation.search import conduct, removal_losses, search_task
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlannedTask,
    require_intended,
    require_listable,
)
from avss_dist.evaluation.sparsify import (
    CHOSEN_BY_TOKEN,
    CalibrationText,
    Unreachable,
    allocate,
    keep_plan,
    require_whole_weights,
)
from avss_dist.evaluation.tasks import make_task, plan_text
from avss_dist.evaluation.trial import Trial, rows_of, sparse_rows
from avss_dist.models.checkpoints import resolve
from avss_dist.pruning.ground_truth import interactions, layer_truth
from avss_dist.pruning.methods import LEAVE_ONE_OUT, Experiment, methods
from avss_dist.pruning.plan import layer_list
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.pruning.repair.repair import Repair
from avss_dist.pruning.search import Effort, search_for
from avss_dist.pruning.selection import Reading
from avss_dist.runs.api import executor_for, overridden, run_job
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.reporter import Reporter
from avss_dist.runs.run import Run
from avss_dist.stats.contrast import contrast
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.scores import RELATIVE_THRESHOLDS, Threshold
from avss_dist.tasks.base import Result, Task
from avss_dist.tasks.layer_removal import LeaveOneOut
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

MOST_EVALUATIONS = 10_000  # evaluations of a model on a task that an experiment makes without `allow_many`


def run_experiment(
    job: JobFile,
    *,
    reporter: Reporter | None = None,
    cells: OnEvent | None = None,
    allow_overlap: bool = False,
    allow_many: bool = False,
    **options: Any,
) -> tuple[list[Run], list[dict[str, Any]]]:
    """Score the runs of a job, choose layers, evaluate, and compare; finished work is not repeated.

    Args:
        job: with a section ``experiment``.
        reporter: receives the callbacks of scoring.
        cells: receives the events of evaluating.
        allow_overlap: evaluate on text that layers were scored on, all the same.
        allow_many: go on with more than `MOST_EVALUATIONS`.
        options: as for `runs.api.run_job`.

    Returns:
        The scored runs, and the rows of ``experiments``, less the columns of RunIdentity but with ``run_id`` and
        ``model``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    if (experiment := job.experiment) is None:
        raise ConfigError(f"{job.path} has no section 'experiment'.", "`run_job` runs what it asks for.")
    specs, execution = overridden(job, options)
    _require_intended(specs, experiment, allow_many=allow_many or experiment.allow_many)
    _require_inputs(specs, experiment)
    for spec in specs if _fitted(experiment) else ():
        require_changeable(spec.execution.partition)
    runs = run_job(job, reporter=reporter or Reporter(), **options)
    tasks = [RedactedURI(task) for task in experiment.tasks]
    store, warehouse = Store(job.warehouse), Warehouse(job.warehouse)
    with closing(executor_for(specs, job.settings, execution)) as executor:
        session = EvaluationSession(store, executor, execution, cells)
        trials = [
            _trial(run, spec, warehouse, session)
            for run, spec in zip(runs, specs, strict=True)
            if run.status != "failed"
        ]
        _read_measured(trials, experiment, warehouse)
        _plan_work(trials, experiment, tasks, warehouse, allow_overlap=allow_overlap)
        measured = _measure(trials, experiment, warehouse, session)
    results = [{name: measured[planned] for name, planned in trial.planned.items()} for trial in trials]
    return runs, _commit_rows(trials, results, experiment, tasks, store)


def _measure(
    trials: Sequence[Trial], experiment: Experiment, warehouse: Warehouse, session: EvaluationSession
) -> dict[PlannedTask, list[Result]]:
    """Choose layers, fit repairs, and measure every task of every trial under all interventions."""
    _plan_sparsities(trials, experiment, warehouse, session)
    if experiment.chooses_by_loss:
        _leave_one_out(trials, session)
    _search(trials, experiment, session)
    for trial in trials:
        trial.choices = trial.choose(experiment)
    _fit_repairs(trials, session)
    return session.measure(
        [
            (planned, interventions)
            for trial in trials
            for interventions in [trial.interventions(experiment)]
            for planned in trial.planned.values()
        ]
    )


def describe_size(job: JobFile) -> str:
    """Return a sentence with the maximum number of evaluations of an experiment, and its factors."""
    assert job.experiment is not None
    number, text = _size(job.specs, job.experiment)
    return text.format(f"{number:,}")


def _size(specs: Sequence[RunSpec], experiment: Experiment) -> tuple[int, str]:
    """Return the number of evaluations, and a text with a place for it."""
    tasks, repairs = len(experiment.tasks), len(experiment.repairs)
    choices = [experiment.count_choices(_count_readings(spec.settings)) for spec in specs]
    return sum(1 + choice * repairs + experiment.count_sparse for choice in choices) * tasks, (
        f"The experiment makes up to {{}} evaluations (models: {len(specs):,}, sets of layers to drop: "
        f"{max(choices, default=0):,}, repairs: {repairs:,}, tasks: {tasks:,})"
    )


def _require_intended(specs: Sequence[RunSpec], experiment: Experiment, *, allow_many: bool) -> None:
    """Refuse more than `MOST_EVALUATIONS` evaluations unless ``allow_many`` is set, before anything is scored."""
    number, text = _size(specs, experiment)
    fewer = "Lower `random`, or name fewer `scores`, `shares`, `sparsities`, `repairs` or `tasks`."
    require_listable(number, "evaluations", fewer)
    require_intended(number, MOST_EVALUATIONS, text, fewer, allow_many=allow_many)


def _count_readings(settings: Settings) -> int:
    """Return the maximum number of readings of AVSS of a run with these settings."""
    return len(settings.sites) * len(RECIPES) * (len(settings.thresholds) + len(RELATIVE_THRESHOLDS))


def _commit_rows(
    trials: Sequence[Trial],
    results: Sequence[Mapping[str, list[Result]]],
    experiment: Experiment,
    tasks: Sequence[str],
    store: Store,
) -> list[dict[str, Any]]:
    """Write the retention of every choice, and return the rows of all trials."""
    numbers = {key: value for key, value in asdict(experiment).items() if key != "allow_many"}
    name = fingerprint(**numbers | {"tasks": tasks})[:20]
    rows = []
    for trial, by_task in zip(trials, results, strict=True):
        mine = list(rows_of(trial, experiment, by_task))
        now = {"created_at": datetime.now(UTC)}
        mine += [{"task": task, **now, **row} for task in trial.planned for row in sparse_rows(trial, task, by_task)]
        store.write_experiment(trial.identity, name, mine)
        rows += [{**row, "run_id": trial.run.run_id, "model": trial.checkpoint.name} for row in mine]
    return rows


def _plan_work(
    trials: Sequence[Trial], experiment: Experiment, tasks: Sequence[str], warehouse: Warehouse, *, allow_overlap: bool
) -> None:
    """Plan evaluations and fits; refuse texts of both and of a trial's scores that overlap."""
    for trial in trials:
        trial.planned = {name: _plan(trial, name, experiment) for name in tasks}
        if repairs := _fitted(experiment):
            trial.fits = _plan_fits(trial, experiment, repairs)
        if not allow_overlap:
            _refuse_overlaps(trial, experiment, warehouse)


def _plan_fits(trial: Trial, experiment: Experiment, repairs: Sequence[str]) -> dict[str, PlannedTask]:
    layers, _ = layer_list(trial.rows, trial.checkpoint.name)
    settings = replace(trial.settings, max_sequences=experiment.repair_max_sequences)
    texts, skip = experiment.repair_corpora, experiment.repair_skip_sequences
    wanted = [Repair(by=by, corpora=texts, skip_sequences=skip, settings=settings) for by in repairs]
    return plan_fits(trial.model, layers, wanted)


def _fitted(experiment: Experiment) -> list[str]:
    return [repair for repair in dict.fromkeys(experiment.repairs) if repair != NO_REPAIR]


def _refuse_overlaps(trial: Trial, experiment: Experiment, warehouse: Warehouse) -> None:
    """Refuse tasks on text that was scored on or is fitted on, and to fit on text that was scored on."""
    checkpoint, run_id, skipped = trial.checkpoint, trial.run.run_id, experiment.repair_skip_sequences
    texts = [text for fit in [*trial.fits.values()][:1] for text in fit_of(fit).texts]
    code = trial.settings.trust_remote_code
    fitted = (text_of_fit(text, skipped, checkpoint, trust_remote_code=code) for text in texts)
    scored = partial(texts_of_run, warehouse, run_id, checkpoint, corpus=trial.corpus)
    tasks = [planned.task for planned in trial.planned.values()]
    refuse_overlap(tasks, chain(texts_of_repair(checkpoint), scored(), fitted))
    refuse_overlap(map(as_task, texts), scored(skip="repair_skip_sequences"))


def _read_measured(trials: Sequence[Trial], experiment: Experiment, warehouse: Warehouse) -> None:
    """Read the measurements of `avss ablate` and the contrasts by which layers of the trials are chosen."""
    scores = set(experiment.scores)
    measured = scores & set(MEASURED) - ({LEAVE_ONE_OUT} if experiment.leave_one_out else set())
    for trial in trials:
        run = warehouse.run(trial.run.run_id)
        assert run is not None
        trial.truth |= {by: layer_truth(warehouse, run, by).by_layer(trial.num_layers) for by in measured}
        trial.interactions = interactions(warehouse, run) if INTERACTIONS in scores else None
        readings = {method.reading for method in methods(experiment, trial.rows) if method.score == CONTRAST}
        trial.contrasts = {reading: _contrast(trial, warehouse, reading) for reading in readings if reading}


def _trial(run: Run, spec: RunSpec, warehouse: Warehouse, session: EvaluationSession) -> Trial:
    checkpoint = resolve(spec.model, trust_remote_code=spec.settings.trust_remote_code)
    rows = warehouse.table("scores", run_ids=[run.run_id]).to_pylist()
    model = session.place(checkpoint, spec.settings, spec.execution)
    return Trial(run=run, model=model, rows=rows, corpus=spec.corpus)


def _plan(trial: Trial, name: str, experiment: Experiment) -> PlannedTask:
    model = trial.model.reading(experiment.max_sequences)
    task = make_task(
        model.checkpoint,
        name,
        model.settings,
        skip_sequences=experiment.skip_sequences,
        skip_questions=experiment.skip_questions,
        limit=experiment.limit,
        prompting=experiment.prompting,
    )
    return model.plan(task)


def _require_inputs(specs: Sequence[RunSpec], experiment: Experiment) -> None:
    """Refuse runs that would not measure the inputs of sparsity plans, before anything is scored.

    Raises:
        ConfigError: the message names the setting.
    """
    if not experiment.sparsities:
        return
    for spec in specs:
        for method in experiment.sparsity_methods:
            require_whole_weights(spec.execution.partition, method)
        if missing := [site for site in INPUTS if site not in spec.settings.sites]:
            raise ConfigError(
                f"`sparsities` need what linear maps read, and {spec.model} is scored without {', '.join(missing)}.",
                "Add inputs to `sites` in the settings of the job.",
            )
    for task in experiment.tasks:
        require_effect(experiment.sparsity_rule, task)


def _plan_sparsities(
    trials: Sequence[Trial], experiment: Experiment, warehouse: Warehouse, session: EvaluationSession
) -> None:
    """Make a sparsity plan for every trial, method and level; None where a method cannot reach the level."""
    for trial in trials if experiment.sparsities else ():
        run = warehouse.run(trial.run.run_id)
        assert run is not None
        measured, model = MeasuredMaps.of_run(warehouse, run), trial.reading(experiment.sparsity_max_sequences)
        text = plan_text(trial.checkpoint, trial.corpus, model.settings)
        source = CalibrationText(model=model, corpus=RedactedURI(trial.corpus), text=text)
        for method in experiment.sparsity_methods:
            again = 0 if method in CHOSEN_BY_TOKEN else experiment.sparsity_corrections
            plan = partial(allocate, session, source, measured, rule=experiment.sparsity_rule, corrections=again)
            for level in experiment.sparsities:
                try:
                    made = plan(level, method)
                except Unreachable:
                    trial.sparsity_plans[method, level] = None
                else:
                    trial.sparsity_plans[method, level] = keep_plan(made, session.store, run)


def _leave_one_out(trials: Sequence[Trial], session: EvaluationSession) -> None:
    """Measure the loss of every trial without each of its layers, on the text that its scores were measured on."""
    planned = []
    for trial in trials:
        text = plan_text(trial.checkpoint, trial.corpus, trial.settings)
        name = f"{SCORES[LEAVE_ONE_OUT].task}{trial.corpus}"
        planned.append(trial.model.plan(Task(name=name, parts=tuple(map(LeaveOneOut, text.shards)))))
    results = session.measure([(one, [NO_INTERVENTION]) for one in planned])
    for trial, one in zip(trials, planned, strict=True):
        values = {result.removed: result.value for result in results[one] if result.metric == LOSS}
        trial.truth[LEAVE_ONE_OUT] = np.array([values.get((layer,), np.nan) for layer in range(trial.num_layers)])


def _search(trials: Sequence[Trial], experiment: Experiment, session: EvaluationSession) -> None:
    """Search sets of layers of every trial, on the text that its scores were measured on."""
    effort = Effort(budget=experiment.search_budget)
    for trial in trials if experiment.search else ():
        model = trial.reading(experiment.search_max_sequences)
        planned = model.plan(search_task(trial.checkpoint, trial.corpus, model.settings))
        losses = removal_losses(session, planned)
        with session.keeping_workers():
            for method in methods(experiment, trial.rows):
                for share in experiment.shares if method.score in SEARCHES else ():
                    searching = search_for(method.choice(share), effort, trial.num_layers)
                    trial.searched[method, share] = whole_layers(conduct(searching, losses)[0])
        session.results(planned)


def _fit_repairs(trials: Sequence[Trial], session: EvaluationSession) -> None:
    """Fit every repair of every trial without each set of layers."""
    wanted = [(fit, trial.drops) for trial in trials for fit in trial.fits.values()]
    if wanted:
        patches = fit_repairs(session, wanted)
        for trial in trials:
            trial.patches = patches


def _contrast(trial: Trial, warehouse: Warehouse, reading: Reading) -> Float64:
    """Return the contrast of every layer of a run on paired text."""
    run = warehouse.run(trial.run.run_id)
    assert run is not None
    site, recipe, value, kind = reading
    strata = Strata.of_run(warehouse, run, site)
    found = np.full(trial.num_layers, np.nan)
    (found[[*strata.layers]],) = contrast(*strata.both_sides(recipe, Threshold(value=value, kind=kind)))
    return found
