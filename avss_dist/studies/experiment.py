"""Experiments: retention of models without the layers that methods choose.

Every choice of `analysis.experiment_choices.choices` is of layers of every run of a job. Each distinct set of layers is
evaluated once on every task and compared with the whole model on the same samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

import numpy as np

from avss_dist.analysis.experiment_choices import Experiment, choices, describe_method
from avss_dist.core.errors import ConfigError
from avss_dist.core.fingerprint import fingerprint
from avss_dist.core.intervention import NO_INTERVENTION, whole_layers
from avss_dist.core.text import RedactedURI
from avss_dist.core.values import NewRow
from avss_dist.corpus.seen import ABLATION, SeenText
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.distillation.curve import ignore
from avss_dist.evaluation.events import Remark
from avss_dist.evaluation.own_text import OwnTextWriter, require_writable
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import earlier_texts, plan_task, plan_text_task, refuse_overlaps
from avss_dist.evaluation.repairs import Patches, fit_of, fit_repairs, plan_fits, repaired_removal, require_changeable
from avss_dist.evaluation.session import EvaluationSession, identity
from avss_dist.models.checkpoint.layer_kinds import rules_of
from avss_dist.models.checkpoint.loading import text_config
from avss_dist.models.checkpoint.locate import resolve
from avss_dist.planning.criteria import criterion_values, read_layers
from avss_dist.planning.patterns import pattern_of
from avss_dist.planning.search import greedy_search
from avss_dist.plans.choice import Choice, PlanError
from avss_dist.plans.criteria import LEAVE_ONE_OUT, Criterion, CriterionValues, Layers, LayerValues
from avss_dist.plans.pattern import Pattern
from avss_dist.plans.run_layers import RunLayers
from avss_dist.plans.seen import seen_by_run
from avss_dist.pruning.repair.registry import NO_REPAIR
from avss_dist.requests import RunJobRequest
from avss_dist.runs.job_file import JobFile, RunSpec
from avss_dist.runs.result import Run
from avss_dist.runs.scoring import executor_for, overridden, run_job
from avss_dist.stats.catalog import GREEDY, MEASURED, SCORES
from avss_dist.stats.metrics import LOSS
from avss_dist.studies.experiment_rows import WHOLE_MODEL, Candidate, candidate_rows
from avss_dist.studies.experiment_size import require_size
from avss_dist.studies.search import searching
from avss_dist.tasks.results import Result
from avss_dist.tasks.text_loss import LeaveOneOut
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

NOT_HASHED = ("tasks", "repair_corpora", "allow_many")
"""Options of an experiment that are not in its id. The ids of evaluations hash what tasks and texts hold."""


@dataclass
class Trial:
    """State of a scored run in an experiment: its layers are chosen, then repaired, then evaluated.

    Attributes:
        model: checkpoint of the run.
        layers: layers of the model, with their scores.
        values: values by which layers are chosen, by criterion. A search has none.
        seen: texts that the scores and measurements were made on.
        planned: tasks by name.
        choices: choices of layers, each with the layers that it drops.
        measured_by: ids of the evaluations that measured the scores of ``avss ablate``, by score.
        pattern: kinds of layers that every choice keeps where programs derive them; None if none is to be kept.
        fits: task of fitting each repair except `pruning.repair.registry.NO_REPAIR`.
        candidates: models to evaluate.
    """

    experiment: Experiment
    run: Run
    model: PlacedModel
    layers: RunLayers
    corpus: str
    pattern: Pattern | None = None
    values: dict[Criterion, CriterionValues] = field(default_factory=dict)
    seen: list[SeenText] = field(default_factory=list)
    planned: dict[str, PlannedTask] = field(default_factory=dict)
    choices: list[tuple[Choice, Layers]] = field(default_factory=list)
    measured_by: dict[str, str] = field(default_factory=dict)
    fits: dict[str, PlannedTask] = field(default_factory=dict)
    candidates: list[Candidate] = field(default_factory=list)

    @classmethod
    def of_run(
        cls, run: Run, spec: RunSpec, experiment: Experiment, warehouse: Warehouse, session: EvaluationSession
    ) -> Trial:
        """Return the trial of a run, with the measurements and contrasts by which its layers are chosen."""
        checkpoint = resolve(spec.model, trust_remote_code=spec.settings.trust_remote_code)
        stored = warehouse.run(run.run_id)
        assert stored is not None
        layers = read_layers(warehouse, stored)
        pattern = None
        if experiment.keep_pattern:
            pattern = pattern_of(rules_of(text_config(checkpoint)), layers.number)
        trial = cls(
            experiment=experiment,
            run=run,
            model=session.place(checkpoint, spec.settings, spec.execution),
            layers=layers,
            pattern=pattern,
            corpus=spec.corpus,
            seen=[*seen_by_run(stored)],
        )
        for choice in choices(experiment, trial.layers.rows):
            trial._read_values(warehouse, choice.criterion)
        return trial

    def _read_values(self, warehouse: Warehouse, criterion: Criterion) -> None:
        """Read the values of a criterion, unless they are known or measured in the experiment."""
        is_measured_by_the_experiment = criterion.by == LEAVE_ONE_OUT and self.experiment.leave_one_out
        if criterion in self.values or criterion.by == GREEDY or is_measured_by_the_experiment:
            return
        values = criterion_values(warehouse, self.layers, criterion)
        self.values[criterion] = values
        self.seen += values.seen
        if criterion.by in MEASURED:
            self.measured_by[criterion.by] = values.run_id

    @property
    def experiment_id(self) -> str:
        """Hash of all that can change a number: the run, methods and shares, tasks, rows, repairs, settings, seeds.

        Texts and the model's settings count through the ids of the run and of the evaluations.
        """
        options = asdict(self.experiment)
        for name in NOT_HASHED:
            del options[name]
        if not self.experiment.keep_pattern:
            del options["keep_pattern"]  # Experiments that were made before it was an option keep their ids.
        return fingerprint(
            run=self.run.run_id,
            options=options,
            tasks=sorted(planned.run_id() for planned in self.planned.values()),
            fits=sorted(fit.run_id() for fit in self.fits.values()),
            measured_by=self.measured_by,
        )[:20]

    def plan(self, session: EvaluationSession, tasks: Sequence[str], *, allow_overlap: bool) -> None:
        """Plan evaluations and fits. Texts of both and of the scores that overlap are refused."""
        experiment = self.experiment
        evaluated = self.model.reading(max_sequences=experiment.max_sequences, skip_sequences=experiment.skip_sequences)
        for name in tasks:
            self.planned[name] = plan_task(
                evaluated,
                name,
                skip_questions=experiment.skip_questions,
                limit=experiment.limit,
                num_fewshot=experiment.num_fewshot,
            )
        fitted_on: Sequence[CorpusPlan] = ()
        if experiment.fitted:
            require_writable(self.model, experiment.repair_corpora)
            self.fits = plan_fits(
                self.model,
                self.layers.list_path(),
                experiment.fitted,
                experiment.repair_corpora,
                own_text=OwnTextWriter(session, self.model),
                max_sequences=experiment.repair_max_sequences,
                skip_sequences=experiment.repair_skip_sequences,
            )
            fitted_on = fit_of(self.fits[experiment.fitted[0]]).texts
        if not allow_overlap:
            refuse_overlaps(
                [planned.task for planned in self.planned.values()],
                fitted_on,
                self.model,
                earlier_texts(self.seen, self.model.checkpoint, [self.corpus]),
                skipped=experiment.repair_skip_sequences,
                skip_option="repair_skip_sequences",
            )

    def choose(self, session: EvaluationSession) -> None:
        """Choose the layers that every method drops at every share. A search is on the text of the scores."""
        every_choice = choices(self.experiment, self.layers.rows)
        searched = self._search([choice for choice in every_choice if choice.by == GREEDY], session)
        for choice in every_choice:
            if choice in searched:
                self.choices.append((choice, searched[choice]))
            if choice.by == GREEDY:
                continue
            try:
                drop = choice.choose(self.values[choice.criterion], self.layers.number, self.pattern)
            except PlanError as error:
                if not choice.keep_pattern:
                    raise
                session.on_event(_left_out(choice, error))
            else:
                self.choices.append((choice, drop))

    def _search(self, greedy: Sequence[Choice], session: EvaluationSession) -> dict[Choice, Layers]:
        """Return the layers that greedy searches choose, by choice."""
        if not greedy:
            return {}
        limits = []
        for limit in (self.model.settings.max_sequences, self.experiment.search_max_sequences):
            if limit is not None:
                limits.append(limit)
        model = self.model.reading(max_sequences=min(limits, default=None))
        searched = {}
        with searching(session, model, self.corpus) as (_, losses):
            for choice in greedy:
                candidates = choice.unprotected(self.layers.number)
                number = choice.number(self.layers.number)
                try:
                    searched[choice], _ = greedy_search(candidates, number, losses, pattern=self.pattern)
                except PlanError as error:
                    if not choice.keep_pattern:
                        raise
                    session.on_event(_left_out(choice, error))
        return searched

    def list_candidates(self, patches: Patches) -> None:
        """List the whole model, and the model without each choice of layers with each repair."""
        self.candidates = [WHOLE_MODEL]
        for choice, drop in self.choices:
            for name in self.experiment.repairs:
                intervention = repaired_removal(drop, self.fits.get(name), patches)
                repair = None if name == NO_REPAIR else name
                self.candidates.append(Candidate(choice, intervention, repair))

    @property
    def guess(self) -> float | None:
        """Loss of a guess among all tokens, in nats per token. None if the size of the vocabulary is unknown."""
        config = text_config(self.model.checkpoint).get_text_config()
        size = getattr(config, "vocab_size", None)
        if not size:
            return None
        return float(np.log(size))

    def measured_rows(self, results: Mapping[PlannedTask, Sequence[Result]]) -> list[NewRow]:
        """Return the rows of ``experiments`` of the candidates without the columns of RunIdentity.

        Args:
            results: results of the tasks, as the session has measured them.
        """
        experiment_id = self.experiment_id
        written_at = datetime.now(UTC)
        guess = self.guess
        rows = []
        for task, planned in self.planned.items():
            common = {"experiment_id": experiment_id, "task": task, "created_at": written_at}
            for candidate in self.candidates:
                measured = candidate_rows(candidate, results[planned], guess)
                rows += [{**common, **row} for row in measured]
        return rows


def _left_out(choice: Choice, error: PlanError) -> Remark:
    """Return the remark that a choice is left out of an experiment."""
    share = f"{choice.share:g}" if choice.share is not None else ""
    return Remark(f"{describe_method(choice)} at a share of {share} is left out. {error.message}")


def run_experiment(job: JobFile, request: RunJobRequest) -> tuple[list[Run], list[NewRow]]:
    """Score the runs of a job, choose layers, evaluate, and compare. Finished work is not repeated.

    Args:
        job: job with a section ``experiment``.
        request: permissions, and fields of `Execution` in place of the job's.

    Returns:
        The scored runs, and the rows of ``experiments``, of whose RunIdentity only ``run_id`` and ``model`` are given.

    Raises:
        AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
    """
    experiment = job.experiment
    if experiment is None:
        raise ConfigError(f"{job.path} has no section 'experiment'.", "`run_job` runs what it asks for.")
    specs, execution = overridden(job, request.replaced)
    require_size(specs, experiment, allow_many=request.allow_many)
    if experiment.fitted:
        for spec in specs:
            require_changeable(spec.execution.partition)
    runs = run_job(job, request.on_event or ignore, **request.replaced)
    store = Store(job.warehouse)
    warehouse = Warehouse(job.warehouse)
    with closing(executor_for(specs, job.settings, execution)) as executor:
        session = EvaluationSession(store, executor, execution, request.on_event)
        trials = []
        for run, spec in zip(runs, specs, strict=True):
            if run.status != "failed":
                trials.append(Trial.of_run(run, spec, experiment, warehouse, session))
        tasks = [RedactedURI(task) for task in experiment.tasks]
        for trial in trials:
            trial.plan(session, tasks, allow_overlap=request.allow_overlap)
        if experiment.leave_one_out:
            _leave_one_out(trials, session)
        for trial in trials:
            trial.choose(session)
        patches = _fit(trials, session)
        work = {}
        for trial in trials:
            trial.list_candidates(patches)
            for planned in trial.planned.values():
                work[planned] = [candidate.intervention for candidate in trial.candidates]
        # All models are measured at once, so that no worker waits for the last cells of another model.
        results = session.measure(work)
    written = []
    for trial in trials:
        run_id = trial.run.run_id
        checkpoint = trial.model.checkpoint
        rows = trial.measured_rows(results)
        model = identity(checkpoint, run_id, trial.layers.rows[0]["family"])
        store.write_rows("experiments", model, rows, trial.experiment_id)
        written += [{**row, "run_id": run_id, "model": checkpoint.name} for row in rows]
    return runs, written


def _fit(trials: Sequence[Trial], session: EvaluationSession) -> Patches:
    """Fit the repairs of every trial to the model without each choice of layers."""
    fits = []
    for trial in trials:
        drops = dict.fromkeys(drop for _, drop in trial.choices)
        for fit in trial.fits.values():
            fits.append((fit, drops))
    if not fits:
        return {}
    return fit_repairs(session, fits)


def _leave_one_out(trials: Sequence[Trial], session: EvaluationSession) -> None:
    """Measure the loss of every trial without each of its layers, on the text that its scores were measured on."""
    prefix = SCORES[LEAVE_ONE_OUT].task
    planned = [plan_text_task(trial.model, trial.corpus, LeaveOneOut, prefix, use=ABLATION) for trial in trials]
    results = session.measure(dict.fromkeys(planned, (NO_INTERVENTION,)))
    for trial, task in zip(trials, planned, strict=True):
        losses: dict[int, float] = {}
        for result in results[task]:
            layers = whole_layers(result.removed)
            if result.metric == LOSS and layers:
                losses[layers[0]] = result.value
        values = LayerValues(values=losses, run_id=task.run_id(), task=task.task.name, seen=task.seen)
        trial.values[Criterion(LEAVE_ONE_OUT)] = values
