"""Experiments: retention of models without the layers that methods choose.

Every choice of `pruning.methods.choices` is of layers of every run of a job. Each distinct set of layers is evaluated
once on every task and compared with the whole model on the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import product
from typing import Any

import numpy as np

from avss_dist.analysis.contrast import Strata
from avss_dist.analysis.verdict import WHOLE
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.registry import CHANCE, CONTRAST, GREEDY, LOSS, MEASURED, READING, RECIPES, SCORES
from avss_dist.core.settings import fingerprint
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.seen import ABLATION, SeenText
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.distillation.curve import ignore
from avss_dist.evaluation.repairs import Patches, fit_of, fit_repairs, plan_fits, require_changeable
from avss_dist.evaluation.search import Layers, greedy_search, searching
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlacedModel,
    PlannedTask,
    identity,
    require_intended,
    require_listable,
    results_under,
)
from avss_dist.evaluation.tasks import earlier_texts, plan_task, plan_text_task, refuse_overlaps
from avss_dist.models.checkpoints import resolve
from avss_dist.models.loading import text_config
from avss_dist.pruning.ground_truth import layer_truth
from avss_dist.pruning.methods import LEAVE_ONE_OUT, Experiment, choices, control_name, describe_method
from avss_dist.pruning.plan import layer_list
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.pruning.seen import seen_by_run
from avss_dist.pruning.selection import RANDOM, Choice, Reading, count_layers
from avss_dist.requests import RunJobRequest
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.run import Run
from avss_dist.runs.scoring import executor_for, overridden, run_job
from avss_dist.stats.contrast import contrast
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.scores import RELATIVE_THRESHOLDS, Threshold
from avss_dist.tasks.task import Result, Retention
from avss_dist.tasks.text_loss import LeaveOneOut
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

NOT_HASHED = ("tasks", "repair_corpora", "allow_many")
"""Options of an experiment that are not in its id. The ids of evaluations hash what tasks and texts hold."""
MOST_EVALUATIONS = 10_000  # evaluations of a model on a task that an experiment makes without `allow_many`

Candidate = tuple[Choice | None, Intervention, str | None]
"""A model that an experiment evaluates: the choice of its layers, None for the whole model, the change, and the name of
its repair, None without one."""


def candidate_rows(candidate: Candidate, results: Sequence[Result], guess: float | None) -> Iterator[dict[str, Any]]:
    """Yield the row of every metric of a task, and for the whole model that of guessing tokens.

    They are rows of ``experiments`` without the columns of RunIdentity.

    Args:
        results: results of the task, those of the whole model included.
        guess: loss of a guess among all tokens, in nats per token; None if it is unknown.
    """
    choice, intervention, repair = candidate
    whole = {result.metric: result for result in results_under(results)}
    reading: Sequence[Any] = (choice and choice.reading) or [None] * len(READING)
    measured: list[tuple[str, float, float | None, Retention | None]] = [
        (result.metric, result.value, result.stderr, Retention.of(before, result) if before and choice else None)
        for result in results_under(results, intervention.key)
        for before in [whole.get(result.metric)]
    ]
    if choice is None and guess is not None and LOSS in whole:
        measured.append((CHANCE, guess, None, None))
    for metric, value, stderr, retention in measured:
        yield {
            **intervention.key.row(),
            "metric": metric,
            "value": value,
            "stderr": stderr,
            "method": describe_method(choice) if choice else WHOLE,
            "share": choice.share if choice else 0.0,
            "score": choice and choice.by,
            **dict(zip(READING, reading, strict=True)),
            "control": choice and control_name(choice),
            "seed": choice.seed if choice and choice.by == RANDOM else None,
            "repair": repair,
            "retention_low": retention and retention.low,
            "retention_high": retention and retention.high,
            "retention": retention.value if retention else None if choice else 1.0,
        }


@dataclass
class Trial:
    """State of a scored run in an experiment.

    Attributes:
        model: checkpoint of the run.
        rows: rows of the table ``scores``.
        truth: values by which layers are chosen, float64[layers], by method and reading: a measurement, or the negative
            contrast on paired text.
        seen: texts that the scores and measurements were made on.
        planned: tasks by name.
        choices: choices of layers, each with the layers that it drops.
        measured_by: ids of the evaluations that measured the scores of ``avss ablate``, by score.
        fits: task of fitting each repair except `pruning.repair.registry.NO_REPAIR`.
    """

    experiment: Experiment
    run: Run
    model: PlacedModel
    rows: Sequence[Mapping[str, Any]]
    corpus: str
    truth: dict[tuple[str, Reading | None], Float64] = field(default_factory=dict)
    seen: list[SeenText] = field(default_factory=list)
    planned: dict[str, PlannedTask] = field(default_factory=dict)
    choices: list[tuple[Choice, Layers]] = field(default_factory=list)
    measured_by: dict[str, str] = field(default_factory=dict)
    fits: dict[str, PlannedTask] = field(default_factory=dict)

    @classmethod
    def of_run(
        cls, run: Run, spec: RunSpec, experiment: Experiment, warehouse: Warehouse, session: EvaluationSession
    ) -> Trial:
        """Return the trial of a run, with the measurements and contrasts by which its layers are chosen."""
        checkpoint = resolve(spec.model, trust_remote_code=spec.settings.trust_remote_code)
        stored = warehouse.run(run.run_id)
        assert stored is not None
        trial = cls(
            experiment=experiment,
            run=run,
            model=session.place(checkpoint, spec.settings, spec.execution),
            rows=warehouse.read_scores(run.run_id),
            corpus=spec.corpus,
            seen=[*seen_by_run(stored)],
        )
        for by, reading in dict.fromkeys((choice.by, choice.reading) for choice in choices(experiment, trial.rows)):
            if by == CONTRAST and reading is not None:
                site, recipe, value, kind = reading
                strata, values = Strata.of_run(warehouse, stored, site), np.full(trial.num_layers, np.nan)
                (values[[*strata.layers]],) = contrast(*strata.both_sides(recipe, Threshold(value=value, kind=kind)))
                trial.truth[by, reading] = -values  # the highest are dropped
            elif by in MEASURED and not (by == LEAVE_ONE_OUT and experiment.leave_one_out):
                measured = layer_truth(warehouse, stored, by)
                trial.truth[by, reading] = measured.by_layer(trial.num_layers)
                trial.seen += measured.seen
                trial.measured_by[by] = measured.run_id
        return trial

    @property
    def num_layers(self) -> int:
        """Number of layers of the model."""
        return count_layers(self.rows)

    @property
    def experiment_id(self) -> str:
        """Hash of all that can change a number: the run, methods and shares, tasks, rows, repairs, settings, seeds.

        Texts and the model's settings count through the ids of the run and of the evaluations.
        """
        options = asdict(self.experiment)
        for name in NOT_HASHED:
            del options[name]
        return fingerprint(
            run=self.run.run_id,
            options=options,
            tasks=sorted(planned.run_id() for planned in self.planned.values()),
            fits=sorted(fit.run_id() for fit in self.fits.values()),
            measured_by=self.measured_by,
        )[:20]

    def plan(self, tasks: Sequence[str], *, allow_overlap: bool) -> None:
        """Plan evaluations and fits. Texts of both and of the scores that overlap are refused."""
        experiment, model = self.experiment, self.model
        skipped = experiment.repair_skip_sequences
        evaluated = model.reading(max_sequences=experiment.max_sequences, skip_sequences=experiment.skip_sequences)
        self.planned = {
            name: plan_task(
                evaluated,
                name,
                skip_questions=experiment.skip_questions,
                limit=experiment.limit,
                num_fewshot=experiment.num_fewshot,
            )
            for name in tasks
        }
        texts: Sequence[CorpusPlan] = ()
        if repairs := experiment.fitted:
            self.fits = plan_fits(
                model,
                layer_list(self.rows, model.checkpoint.name)[0],
                repairs,
                experiment.repair_corpora,
                max_sequences=experiment.repair_max_sequences,
                skip_sequences=skipped,
            )
            texts = fit_of(self.fits[repairs[0]]).texts
        if not allow_overlap:
            refuse_overlaps(
                [planned.task for planned in self.planned.values()],
                texts,
                model,
                earlier_texts(self.seen, model.checkpoint, [self.corpus]),
                skipped=skipped,
                skip_option="repair_skip_sequences",
            )

    def choose(self, session: EvaluationSession) -> None:
        """Choose the layers that every method drops at every share. A search is on the text of the scores."""
        every_choice, layers, searched = choices(self.experiment, self.rows), self.num_layers, dict[Choice, Layers]()
        if GREEDY in self.experiment.scores:
            limits = [n for n in (self.model.settings.max_sequences, self.experiment.search_max_sequences) if n]
            model = self.model.reading(max_sequences=min(limits, default=None))
            with searching(session, model, self.corpus) as (_, losses):
                for choice in (choice for choice in every_choice if choice.by == GREEDY):
                    searched[choice], _ = greedy_search(choice.unprotected(layers), choice.number(layers), losses)
        for choice in every_choice:
            truth = {by: values for (by, reading), values in self.truth.items() if reading == choice.reading}
            self.choices.append((choice, searched.get(choice) or choice.drop(choice.scores(self.rows, truth))))

    def candidates(self, patches: Patches) -> Iterator[Candidate]:
        """Yield the whole model, and the model without each choice of layers, by repair."""
        yield None, NO_INTERVENTION, None
        for (choice, drop), repair in product(self.choices, self.experiment.repairs):
            intervention = Intervention(removed=drop, patch=patches.get((self.fits.get(repair), drop)))
            yield choice, intervention, None if repair == NO_REPAIR else repair


def run_experiment(job: JobFile, request: RunJobRequest) -> tuple[list[Run], list[dict[str, Any]]]:
    """Score the runs of a job, choose layers, evaluate, and compare. Finished work is not repeated.

    Args:
        job: job with a section ``experiment``.
        request: permissions, and fields of ``settings.Execution`` in place of the job's.

    Returns:
        The scored runs, and the rows of ``experiments``, of whose RunIdentity only ``run_id`` and ``model`` are given.

    Raises:
        AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
    """
    if (experiment := job.experiment) is None:
        raise ConfigError(f"{job.path} has no section 'experiment'.", "`run_job` runs what it asks for.")
    specs, execution = overridden(job, request.replaced)
    number, text = _size(specs, experiment)
    fewer = "Lower `random`, or name fewer `scores`, `shares`, `repairs` or `tasks`."
    require_listable(number, "evaluations", fewer)
    require_intended(number, MOST_EVALUATIONS, text, fewer, allow_many=request.allow_many or experiment.allow_many)
    for spec in specs if experiment.fitted else ():
        require_changeable(spec.execution.partition)
    runs = run_job(job, request.on_event or ignore, **request.replaced)
    tasks = [RedactedURI(task) for task in experiment.tasks]
    store, warehouse = Store(job.warehouse), Warehouse(job.warehouse)
    with closing(executor_for(specs, job.settings, execution)) as executor:
        session = EvaluationSession(store, executor, execution, request.on_event)
        trials = [
            Trial.of_run(run, spec, experiment, warehouse, session)
            for run, spec in zip(runs, specs, strict=True)
            if run.status != "failed"
        ]
        for trial in trials:
            trial.plan(tasks, allow_overlap=request.allow_overlap)
        if experiment.leave_one_out:
            _leave_one_out(trials, session)
        for trial in trials:
            trial.choose(session)
        fits = [
            (fit, dict.fromkeys(drop for _, drop in trial.choices)) for trial in trials for fit in trial.fits.values()
        ]
        patches = fit_repairs(session, fits) if fits else {}
        candidates = [[*trial.candidates(patches)] for trial in trials]
        measured = session.measure(
            {
                planned: [intervention for _, intervention, _ in evaluated]
                for trial, evaluated in zip(trials, candidates, strict=True)
                for planned in trial.planned.values()
            }
        )
    written = []
    for trial, evaluated in zip(trials, candidates, strict=True):
        run_id, checkpoint = trial.run.run_id, trial.model.checkpoint
        config = text_config(checkpoint).get_text_config()
        guess = float(np.log(config.vocab_size)) if getattr(config, "vocab_size", None) else None
        experiment_id = trial.experiment_id
        written_at = datetime.now(UTC)
        rows = [
            {"experiment_id": experiment_id, "task": task, "created_at": written_at, **row}
            for (task, planned), candidate in product(trial.planned.items(), evaluated)
            for row in candidate_rows(candidate, measured[planned], guess)
        ]
        store.write_rows("experiments", identity(checkpoint, run_id, trial.rows[0]["family"]), rows, experiment_id)
        written += [{**row, "run_id": run_id, "model": checkpoint.name} for row in rows]
    return runs, written


def describe_size(job: JobFile) -> str:
    """Return a sentence with the maximum number of evaluations of an experiment, and its factors."""
    assert job.experiment is not None
    number, text = _size(job.specs, job.experiment)
    return text.format(f"{number:,}")


def _size(specs: Sequence[RunSpec], experiment: Experiment) -> tuple[int, str]:
    """Return the maximum number of evaluations, and a sentence with a place for it."""
    tasks, repairs = len(experiment.tasks), len(experiment.repairs)
    read = [(len(spec.settings.sites), len(spec.settings.thresholds) + len(RELATIVE_THRESHOLDS)) for spec in specs]
    counts = [experiment.count_choices(sites * len(RECIPES) * thresholds) for sites, thresholds in read]
    return sum(1 + count * repairs for count in counts) * tasks, (
        f"The experiment makes up to {{}} evaluations (models: {len(specs):,}, sets of layers to drop: "
        f"{max(counts, default=0):,}, repairs: {repairs:,}, tasks: {tasks:,})"
    )


def _leave_one_out(trials: Sequence[Trial], session: EvaluationSession) -> None:
    """Measure the loss of every trial without each of its layers, on the text that its scores were measured on."""
    prefix = SCORES[LEAVE_ONE_OUT].task
    planned = [plan_text_task(trial.model, trial.corpus, LeaveOneOut, prefix, use=ABLATION) for trial in trials]
    results = session.measure(dict.fromkeys(planned, (NO_INTERVENTION,)))
    for trial, task in zip(trials, planned, strict=True):
        values = {result.removed: result.value for result in results[task] if result.metric == LOSS}
        trial.truth[LEAVE_ONE_OUT, None] = np.array([values.get((layer,), np.nan) for layer in range(trial.num_layers)])
