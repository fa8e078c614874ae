"""Evaluation of models and plans on tasks, each compared with its whole model on the same samples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
from torch import nn

from avss_dist.analysis.differences import NO_COLUMNS, PairedComparison, compare_results, describe_differences
from avss_dist.analysis.verdict import kept_by_guess, primary_metric
from avss_dist.core.errors import AvssError, ConfigError, ModelError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import Settings
from avss_dist.core.text import RedactedURI, basename
from avss_dist.core.values import NewRow
from avss_dist.evaluation.events import OnEvent, Remark
from avss_dist.evaluation.forecast import Forecast, forecast_memory, forecast_step, forecasting, larger
from avss_dist.evaluation.pace import past_speed
from avss_dist.evaluation.placed import PlacedModel, PlannedTask
from avss_dist.evaluation.planned_tasks import plan_task, refuse_seen, row_start_task
from avss_dist.evaluation.session import EvaluationSession, results_under
from avss_dist.evaluation.speed import Speed
from avss_dist.evaluation.timing import SpeedSubject, measure_speed, removed_layers
from avss_dist.models.checkpoint.layer_kinds import describe_misread, rules_of
from avss_dist.models.checkpoint.loading import candidate_layers, text_config
from avss_dist.models.checkpoint.locate import Checkpoint, resolve
from avss_dist.models.checkpoint.size import load_skeleton
from avss_dist.models.structure.layers import is_linear, linear_sizes
from avss_dist.plans.choice import PlanError
from avss_dist.plans.map_plans import PrecisionPlan, SparsityPlan
from avss_dist.plans.plan import ModelPlan, Plan, read_checked_plan, read_plan, read_plan_file
from avss_dist.pruning.checkpoint import find_base
from avss_dist.requests import EvaluateRequest
from avss_dist.stats.metrics import REALIZED, row_start_warning
from avss_dist.tasks.results import Result, Retention
from avss_dist.warehouse.names import PERPLEXITY, ROW_START
from avss_dist.warehouse.reader import Warehouse

_ANOTHER_MODEL = "Is it a plan for another model? Score this one, and make a plan of its own."
_Key = tuple[str, str]  # revision and task


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model to evaluate, and the changes that are made to it.

    Attributes:
        label: name for people.
        intervention: changes of the plans that the subject was read from.
        plans: its plans. The texts that they were made from are not held out.
        base: model that a pruned checkpoint was made from, with which it is compared.
        sparsity_plan: plan of its sparsity.
        precision_plan: plan of the number formats of its weights.
    """

    checkpoint: Checkpoint
    label: str
    intervention: Intervention = NO_INTERVENTION
    plans: tuple[AnyPlan, ...] = field(default=(), compare=False, repr=False)
    base: Checkpoint | None = None
    sparsity_plan: SparsityPlan | None = field(default=None, compare=False, repr=False)
    precision_plan: PrecisionPlan | None = field(default=None, compare=False, repr=False)

    @property
    def whole(self) -> Checkpoint:
        """Checkpoint of the whole model that the subject is compared with."""
        return self.base or self.checkpoint

    @property
    def is_changed(self) -> bool:
        """Whether the subject is compared with a whole model, which it is not itself."""
        return bool(self.intervention) or self.base is not None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A metric of one subject on a task, and the same metric of the whole model.

    Attributes:
        whole: metric of the whole model; None for the whole model itself.
        retained: retention of the metric; None for the whole model itself.
        compared: difference from the same metric of the first subject, over the same samples; None for the first
            subject and for a whole model.
    """

    subject: Subject
    task: str
    result: Result
    whole: Result | None
    retained: Retention | None
    compared: PairedComparison | None = None

    def rows(self) -> Iterator[NewRow]:
        """Yield a row of the table of `Evaluations` for the metric, and one for the perplexity of a loss."""
        whole_values = {}
        if self.whole is not None:
            whole_values = {metric: value for metric, value, _ in self.whole.metrics()}
        retained: NewRow = {"retention": None, "retention_low": None, "retention_high": None}
        if self.retained is not None:
            retained["retention"] = self.retained.value
            retained["retention_low"] = self.retained.low
            retained["retention_high"] = self.retained.high
        dropped = [str(removed) for removed in self.subject.intervention.removed]
        for metric, value, stderr in self.result.metrics():
            compared = NO_COLUMNS
            if self.compared is not None:
                compared = self.compared.columns(metric)
            yield {
                "subject": self.subject.label,
                "dropped": dropped,
                "task": self.task,
                "metric": metric,
                "value": value,
                "stderr": stderr,
                "whole": whole_values.get(metric),
                **retained,
                "num_samples": len(self.result.samples),
                **compared,
            }


class Evaluations(list[Evaluation], TabularResult):
    """Evaluations of several subjects, in their order and that of the tasks.

    Attributes:
        findings: sentences for people, on differences between subjects, realized sparsities, guesses and starts of
            rows.
        speed: speed and memory of each smaller model beside its whole one, where they were asked for and measured.
    """

    _bars = ("retention",)
    __repr__ = TabularResult.__repr__

    def __init__(
        self, evaluations: Iterable[Evaluation], *, findings: Iterable[str] = (), speed: Iterable[Speed] = ()
    ) -> None:
        super().__init__(evaluations)
        self.findings = tuple(findings)
        self.speed = tuple(speed)

    @property
    def comparisons(self) -> list[PairedComparison]:
        """Comparisons of the other subjects with the first one, in the order of the evaluations."""
        return [evaluation.compared for evaluation in self if evaluation.compared is not None]

    def table(self) -> pa.Table:
        """Return a table with a row for each subject, task and metric."""
        rows: list[NewRow] = []
        for evaluation in self:
            rows += evaluation.rows()
        return pa.Table.from_pylist(rows)


def evaluate(request: EvaluateRequest) -> Evaluations:
    """Evaluate models and plans on tasks. Cells that the warehouse has are not measured again.

    A plan is a plan object, or a file that ends in ``.yaml`` or ``.yml``. Its whole model is evaluated, too, and so is
    the base model of a pruned checkpoint.

    Every subject is also compared with the first one (``Evaluation.compared``), in each metric of each task, over the
    same samples: the difference of the metric, in its unit, and that of its retention, as a share, both that of the
    subject less that of the first one, with 95% intervals. Subjects that are the whole model of others are not
    compared so. Where the samples are not the same, ``problem`` of the comparison says why there is no difference.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`). Measured cells remain in the warehouse.
    """
    subjects = _subjects(request)
    with EvaluationSession.open(request.warehouse, request.settings, request.execution, request.on_event) as session:
        plan = _plan_evaluations(request, session, subjects)
        measured = session.measure(plan.work)
        _keep_precision(session, subjects, plan.names, plan.tasks)
    tasks = plan.names
    planned = plan.tasks
    row_starts = plan.row_starts
    results = {key: measured[task] for key, task in planned.items()}
    evaluations: list[Evaluation] = []
    for subject in subjects:
        for name in tasks:
            evaluations += _compare(subject, name, results)
    evaluations = _with_differences(evaluations, subjects, planned)
    findings = [
        *describe_differences([evaluation.compared for evaluation in evaluations if evaluation.compared]),
        *_sparsity_findings(subjects, tasks, results),
        *_precision_findings(subjects),
        *_guess_findings(evaluations),
    ]
    for task in row_starts:
        findings += _row_start_findings(task, measured[task])
    speed: list[Speed] = []
    if request.speed:
        models = {task.checkpoint.revision: task for task in planned.values()}
        speed, obstacles = _measure_speed(subjects, models, session.on_event)
        findings += obstacles
    return Evaluations(evaluations, findings=findings, speed=speed)


def forecast_evaluation(request: EvaluateRequest) -> Forecast:
    """Return what `evaluate` would do. Nothing is measured or written.

    Raises:
        AvssError: a mistake, as in `evaluate`.
    """
    subjects = _subjects(request)
    with forecasting(request.warehouse, request.settings, request.execution, request.on_event) as session:
        plan = _plan_evaluations(request, session, subjects)
        steps = []
        memory = None
        for task, interventions in plan.work.items():
            cells = task.cells(interventions)
            step = f"{task.task.name} of {basename(task.checkpoint.name)}"
            steps.append(forecast_step(session, step, cells, task, past_speed(session, task)))
            memory = larger(memory, forecast_memory(session, task, cells))
    notes = []
    if request.speed:
        notes.append("Speed is measured afterwards, which is not part of the time.")
    return Forecast(steps=steps, memory=memory, notes=notes)


def _subjects(request: EvaluateRequest) -> list[Subject]:
    """Return the subjects of a request, with their base models."""
    subjects = _with_bases(_read_subjects(request.subjects, request.sparse, request.settings), request.base)
    if request.speed:
        _require_smaller(subjects)
    return subjects


@dataclass(frozen=True, kw_only=True)
class _PlannedEvaluations:
    """Tasks of the checkpoints of all subjects.

    Attributes:
        names: names of the tasks.
        tasks: each task of each checkpoint.
        row_starts: tasks that read texts with another start of their rows.
        work: all of them, each with its interventions.
    """

    names: list[RedactedURI]
    tasks: dict[_Key, PlannedTask]
    row_starts: list[PlannedTask]
    work: dict[PlannedTask, list[Intervention]]


def _plan_evaluations(
    request: EvaluateRequest, session: EvaluationSession, subjects: Sequence[Subject]
) -> _PlannedEvaluations:
    """Return all that is measured for subjects, before it is. Text that was read on the way to them is refused."""
    tasks = [RedactedURI(task) for task in request.tasks]
    planned = _plan_tasks(request, session, subjects, tasks)
    _require_same_tokens(subjects, tasks, planned)
    if not request.allow_overlap:
        _refuse_overlaps(subjects, planned, tasks, Warehouse(request.warehouse))
    for sentence in _misread_layers(subjects):
        session.on_event(Remark(sentence))
    row_starts = _row_start_tasks(planned)
    work: dict[PlannedTask, list[Intervention]] = {}
    for (revision, _), task in planned.items():
        changes = [subject.intervention for subject in subjects if subject.checkpoint.revision == revision]
        work[task] = [NO_INTERVENTION, *changes]
    for task in row_starts:
        work[task] = [NO_INTERVENTION]
    return _PlannedEvaluations(names=tasks, tasks=planned, row_starts=row_starts, work=work)


def _require_smaller(subjects: Sequence[Subject]) -> None:
    """Refuse to compare speeds if no subject is a changed or pruned model.

    Raises:
        ConfigError: all subjects are whole models.
    """
    for subject in subjects:
        if subject.is_changed:
            return
    raise ConfigError(
        "`speed` compares smaller models with their whole ones, and none of these is smaller.",
        "Name a plan, or the whole model of a checkpoint with `base`.",
    )


def _measure_speed(
    subjects: Sequence[Subject], models: Mapping[str, PlacedModel], on_event: OnEvent
) -> tuple[list[Speed], list[str]]:
    """Return the speed of each smaller model beside its whole one, and a sentence for each that was not measured.

    Args:
        models: placed models by revision.
    """
    obstacles: list[str] = []
    smaller: dict[str, list[SpeedSubject]] = {}
    for subject in subjects:
        if not subject.is_changed:
            continue
        removed = removed_layers(subject.intervention)
        if removed is None:
            obstacles.append(
                f"{subject.label}: its speed is not measured, because sparsity, rounding and the removal of experts "
                "or sublayers take as long here as the whole model."
            )
            continue
        model = models[subject.checkpoint.revision]
        beside = smaller.setdefault(subject.whole.revision, [])
        beside.append(SpeedSubject(label=subject.label, model=model, removed=removed))
    speed: list[Speed] = []
    for revision, beside in smaller.items():
        whole = models[revision]
        try:
            speed += measure_speed(SpeedSubject(label=whole.checkpoint.name, model=whole), beside, on_event)
        except AvssError as error:
            obstacles.append(f"Speed was not measured. {error.message}")
    return speed, obstacles


def _plan_tasks(
    request: EvaluateRequest, session: EvaluationSession, subjects: Sequence[Subject], tasks: Sequence[str]
) -> dict[_Key, PlannedTask]:
    """Return each task of each checkpoint of the subjects."""
    planned: dict[_Key, PlannedTask] = {}
    for checkpoint in _checkpoints(subjects):
        model = session.place(checkpoint, request.settings)
        for name in tasks:
            planned[checkpoint.revision, name] = plan_task(
                model,
                name,
                skip_questions=request.skip_questions,
                limit=request.limit,
                num_fewshot=request.num_fewshot,
            )
    return planned


def _keep_precision(
    session: EvaluationSession,
    subjects: Sequence[Subject],
    tasks: Sequence[str],
    planned: Mapping[_Key, PlannedTask],
) -> None:
    """Write the number formats of precision plans beside the results of the tasks."""
    for subject in subjects:
        if subject.precision_plan is None:
            continue
        for name in tasks:
            evaluated = planned[subject.checkpoint.revision, name]
            session.keep_precision(evaluated, subject.intervention, subject.precision_plan)


def _checkpoints(subjects: Iterable[Subject]) -> list[Checkpoint]:
    """Return the checkpoints of subjects and of their base models, each once."""
    checkpoints: dict[str, Checkpoint] = {}
    for subject in subjects:
        checkpoints[subject.checkpoint.revision] = subject.checkpoint
        if subject.base is not None:
            checkpoints[subject.base.revision] = subject.base
    return list(checkpoints.values())


def _misread_layers(subjects: Sequence[Subject]) -> Iterator[str]:
    """Yield sentences on layers that other programs would take for another kind after the cuts of plans."""
    for subject in subjects:
        for plan in subject.plans:
            if isinstance(plan, Plan) and plan.dropped_layers:
                for sentence in describe_misread(rules_of(text_config(subject.checkpoint)), plan.keep):
                    yield f"{subject.label}: {sentence}"


def _row_start_tasks(planned: Mapping[_Key, PlannedTask]) -> list[PlannedTask]:
    """Return the tasks that read the texts of perplexities with another start of their rows."""
    tasks = []
    for (_, name), task in planned.items():
        if not name.startswith(PERPLEXITY):
            continue
        other = row_start_task(task)
        if other is not None:
            tasks.append(other)
    return tasks


def _require_same_tokens(
    subjects: Sequence[Subject], tasks: Sequence[str], planned: Mapping[_Key, PlannedTask]
) -> None:
    """Refuse a base model that reads a task in other tokens, because its samples cannot be paired."""
    for subject in subjects:
        for name in tasks:
            own = planned[subject.checkpoint.revision, name].task
            whole = planned[subject.whole.revision, name].task
            if own.key != whole.key:
                raise ConfigError(
                    f"{subject.whole.name} and {subject.label} read {RedactedURI(name)} in different tokens.",
                    "Name the model that it was made of with `base`.",
                )


def _refuse_overlaps(
    subjects: Sequence[Subject], planned: Mapping[_Key, PlannedTask], names: Sequence[RedactedURI], warehouse: Warehouse
) -> None:
    """Refuse text that was read on the way to a checkpoint or to the plans of its subjects."""
    corpora = [name.full.removeprefix(PERPLEXITY) for name in names if name.startswith(PERPLEXITY)]
    for checkpoint in _checkpoints(subjects):
        tasks = [planned[checkpoint.revision, name].task for name in names]
        plans: list[AnyPlan] = []
        for subject in subjects:
            if subject.checkpoint.revision == checkpoint.revision:
                plans += subject.plans
        refuse_seen(tasks, checkpoint, plans, warehouse, corpora)


def _compare(subject: Subject, task: str, results: Mapping[_Key, Sequence[Result]]) -> Iterator[Evaluation]:
    """Yield the metrics of a subject on a task, each compared with that of the whole model."""
    whole: dict[str, Result] = {}
    if subject.is_changed:
        whole = {result.metric: result for result in results_under(results[subject.whole.revision, task])}
    for result in results_under(results[subject.checkpoint.revision, task], subject.intervention.key):
        before = whole.get(result.metric)
        retained = None
        if before is not None:
            retained = Retention.of(before, result)
        yield Evaluation(subject=subject, task=task, result=result, whole=before, retained=retained)


def _with_differences(
    evaluations: Sequence[Evaluation], subjects: Sequence[Subject], planned: Mapping[_Key, PlannedTask]
) -> list[Evaluation]:
    """Return evaluations with the comparison of each with the first subject that is no whole model of another."""
    wholes = {subject.whole.revision for subject in subjects if subject.is_changed}
    candidates = [subject for subject in subjects if subject.is_changed or subject.checkpoint.revision not in wholes]
    of_first: dict[tuple[str, str], Evaluation] = {}
    for evaluation in evaluations:
        if candidates and evaluation.subject is candidates[0]:
            of_first[evaluation.task, evaluation.result.metric] = evaluation
    compared = []
    for evaluation in evaluations:
        is_compared = any(evaluation.subject is subject for subject in candidates[1:])
        if is_compared:
            other = of_first.get((evaluation.task, evaluation.result.metric))
            evaluation = replace(evaluation, compared=_compare_with(evaluation, candidates[0], other, planned))
        compared.append(evaluation)
    return compared


def _compare_with(
    evaluation: Evaluation, reference: Subject, other: Evaluation | None, planned: Mapping[_Key, PlannedTask]
) -> PairedComparison:
    """Return the comparison of an evaluation with that of another subject on the same task.

    Args:
        reference: the other subject.
        other: its evaluation; None if it has none in this metric.
    """
    subject = evaluation.subject
    own_task = planned[subject.checkpoint.revision, evaluation.task].task
    other_task = planned[reference.checkpoint.revision, evaluation.task].task
    if own_task.key != other_task.key:
        return PairedComparison(
            label=subject.label,
            reference=reference.label,
            task=evaluation.task,
            metric=evaluation.result.metric,
            problem="their samples are not the same, as their tokenizers or chat templates differ",
        )
    whole = None
    if reference.is_changed and subject.whole.revision == reference.whole.revision:
        whole = evaluation.whole
    return compare_results(
        evaluation.result,
        None if other is None else other.result,
        whole,
        label=subject.label,
        reference=reference.label,
        task=evaluation.task,
    )


def _sparsity_findings(
    subjects: Sequence[Subject], tasks: Sequence[str], results: Mapping[_Key, Sequence[Result]]
) -> Iterator[str]:
    """Yield a sentence on the realized sparsity of each sparsity plan on each task."""
    for subject in subjects:
        if subject.sparsity_plan is None:
            continue
        for name in tasks:
            measured = _realized_sparsity(subject, results[subject.checkpoint.revision, name])
            sentence = subject.sparsity_plan.describe_realized(measured)
            if sentence:
                yield f"{subject.label}, {name}: {sentence}"


def _realized_sparsity(subject: Subject, results: Sequence[Result]) -> dict[tuple[int, str], float]:
    """Return the share of zeros that a task measured in each linear map of a subject, by layer and name of the map."""
    measured = {}
    for result in results:
        is_of_subject = result.intervention == subject.intervention.key
        if is_of_subject and result.layer is not None and result.metric.startswith(REALIZED):
            measured[result.layer, result.metric.removeprefix(REALIZED)] = result.value
    return measured


def _precision_findings(subjects: Sequence[Subject]) -> Iterator[str]:
    """Yield a sentence on the bits per weight of each precision plan."""
    for subject in subjects:
        if subject.precision_plan is not None:
            yield f"{subject.label}: {subject.precision_plan.describe()[0]}"


def _guess_findings(evaluations: Iterable[Evaluation]) -> Iterator[str]:
    """Yield a sentence on the retention of a guess, for each task and whole model that a subject is compared with."""
    rows_of_whole: dict[tuple[str, str], list[NewRow]] = {}
    for evaluation in evaluations:
        whole = evaluation.whole
        if whole is not None:
            rows = rows_of_whole.setdefault((evaluation.subject.whole.name, evaluation.task), [])
            rows.append({"score": None, "metric": whole.metric, "value": whole.value})
    for (model, task), rows in rows_of_whole.items():
        metric = primary_metric(rows)
        guess = kept_by_guess(rows, metric)
        if guess:
            yield f"{task}: a guess keeps {guess:z.1%} of the {metric} of {model}."


def _row_start_findings(planned: PlannedTask, results: Sequence[Result]) -> list[str]:
    """Return a sentence for a text that is far likelier with another start of its rows."""
    losses = {result.metric: result.value for result in results if not result.removed}
    corpus = planned.task.name.removeprefix(ROW_START)
    warning = row_start_warning(losses, planned.checkpoint.name, corpus)
    if warning is None:
        return []
    return [warning[1]]


AnyPlan = Plan | SparsityPlan | PrecisionPlan


def _read_subjects(named: Sequence[str | AnyPlan], sparse: str | AnyPlan | None, settings: Settings) -> list[Subject]:
    """Return the subjects that are named. Each is followed by a copy with a sparsity plan, if one is given.

    Args:
        named: models, plans, and files of plans.
        sparse: the sparsity plan, or its file.

    Raises:
        AvssError: a model or plan cannot be read, or ``sparse`` is not a sparsity plan for the same model.
    """
    subjects = [_read_subject(name, settings) for name in named]
    if sparse is None:
        return subjects
    added = _read_subject(sparse, settings)
    if added.sparsity_plan is None:
        raise PlanError(f"{added.label} is not a sparsity plan.", "avss sparsify makes one.")
    for subject in subjects:
        if subject.checkpoint.revision != added.checkpoint.revision:
            raise PlanError(
                f"{added.label} is for {added.checkpoint.name}, and {subject.label} is another model.",
                "Make a plan for each model.",
            )
    with_copies = []
    for subject in subjects:
        copy = replace(
            subject,
            label=f"{subject.label} + {added.label}",
            intervention=replace(subject.intervention, sparsity=added.intervention.sparsity),
            plans=(*subject.plans, *added.plans),
            sparsity_plan=added.sparsity_plan,
        )
        with_copies += [subject, copy]
    return with_copies


def _read_subject(named: str | AnyPlan, settings: Settings) -> Subject:
    """Return a model, or a plan with the checkpoint that it is for.

    Args:
        named: a model, a plan, or the file of a plan.
        settings: whether code of a checkpoint is trusted, and the path of its layer list.

    Raises:
        AvssError: there is no such model or file, or the plan does not fit the current state of its model.
    """
    if isinstance(named, ModelPlan):
        plan = named
        name = named.label
    elif named.endswith((".yaml", ".yml")):
        plan = _read_any_plan(named)
        name = named
    else:
        return Subject(checkpoint=resolve(named, trust_remote_code=settings.trust_remote_code), label=named)
    try:
        checkpoint = resolve(plan.model, trust_remote_code=settings.trust_remote_code)
    except ModelError as error:
        raise ModelError(f"{name}: the key 'model' names no checkpoint: {error.message}", error.hint) from error
    if plan.revision is not None and plan.revision != checkpoint.revision:
        raise PlanError(
            f"{name} is for {plan.model} at {plan.revision[:12]}; it is at {checkpoint.revision[:12]} now.",
            "Score it again, and make a plan of its own.",
        )
    _require_same_layers(checkpoint, name, plan, settings)
    return Subject(
        checkpoint=checkpoint,
        label=name,
        intervention=plan.intervention,
        plans=(plan,),
        sparsity_plan=plan if isinstance(plan, SparsityPlan) else None,
        precision_plan=plan if isinstance(plan, PrecisionPlan) else None,
    )


def _read_any_plan(file: str) -> AnyPlan:
    """Return the plan in a file, of the kind that its keys tell."""
    keys = read_plan_file(file).value
    if SparsityPlan.key in keys:
        return read_checked_plan(SparsityPlan, file)
    if PrecisionPlan.key in keys:
        return read_checked_plan(PrecisionPlan, file)
    return read_plan(file)


def _require_same_layers(checkpoint: Checkpoint, file: str, plan: AnyPlan, settings: Settings) -> None:
    """Refuse a plan whose layers or linear maps are not those of its model.

    A model that cannot be built without its weights is not checked here. It refuses what it does not have. The linear
    maps of a model with several module lists that may be its layers are not checked, either.

    Raises:
        PlanError: the layers differ, or a linear map. The message has the values of the plan and of the model.
    """
    lists: dict[str, nn.ModuleList] = {}
    with suppress(ModelError):
        model, _ = load_skeleton(checkpoint, settings)
        lists = candidate_layers(model, settings.layers)
    if not lists:
        return
    if isinstance(plan, Plan):
        if plan.layers not in lists:
            paths = " or ".join(f"'{path}'" for path in lists)
            raise PlanError(
                f"{file}: the key 'layers' is '{plan.layers}', and the layers of {checkpoint.name} are {paths}.",
                "Write that in the file; or, if the plan means another list of modules, name it with `layers`.",
            )
        lists = {plan.layers: lists[plan.layers]}
    lists_of_that_length = [layers for layers in lists.values() if len(layers) == plan.num_layers]
    if not lists_of_that_length:
        lengths = sorted({len(layers) for layers in lists.values()})
        numbers = " or ".join(map(str, lengths))
        raise PlanError(
            f"{file}: the key 'num_layers' is {plan.num_layers}, and {checkpoint.name} has {numbers} layers.",
            _ANOTHER_MODEL,
        )
    if not isinstance(plan, Plan) and len(lists_of_that_length) == 1:
        _require_same_maps(checkpoint, file, plan, lists_of_that_length[0])


def _require_same_maps(
    checkpoint: Checkpoint, file: str, plan: SparsityPlan | PrecisionPlan, layers: nn.ModuleList
) -> None:
    """Refuse a plan with a linear map that the layers of its model do not have, or have in another size."""
    for number, entry in enumerate(plan.maps, start=1):
        where = f"{file}: map {number} of the key '{plan.key}', '{entry.map}' of layer {entry.layer},"
        try:
            module = layers[entry.layer].get_submodule(entry.map)
        except AttributeError:
            raise PlanError(f"{where} is not in {checkpoint.name}.", _ANOTHER_MODEL) from None
        if not is_linear(module):  # an activation that gates the MLP
            continue
        inputs, outputs = linear_sizes(module)
        problem = entry.contradiction(checkpoint.name, outputs, inputs)
        if problem:
            raise PlanError(f"{where} {problem}.", _ANOTHER_MODEL)


def _with_bases(subjects: Sequence[Subject], base: str | Path | None) -> list[Subject]:
    """Return subjects with the base models of those that are checkpoints.

    Args:
        base: the base model; by default the model that the card of each pruned checkpoint names.

    Raises:
        ConfigError: a base model is given, and all subjects are plans; or one that a card names is not found.
        AvssError: the given base model cannot be opened.
    """
    if base is not None and all(subject.intervention for subject in subjects):
        raise ConfigError("`base` has no effect on plans, which name their own models.", "Leave it out.")
    named = None
    if base is not None:
        named = resolve(str(base), trust_remote_code=subjects[0].checkpoint.trust_remote_code)
    with_bases = []
    for subject in subjects:
        model = None
        if not subject.intervention:
            model = named or _base_of(subject)
        if model is not None and model.revision == subject.checkpoint.revision:
            model = None
        with_bases.append(replace(subject, base=model))
    return with_bases


def _base_of(subject: Subject) -> Checkpoint | None:
    """Return the base model that a pruned checkpoint's card names, beside the checkpoint or where the card says.

    Returns:
        None for a model that `pruning.checkpoint.prune` has not written.

    Raises:
        ConfigError: it is not there, or has changed. This is known before anything is measured.
    """
    hint = f"Name it with `base` to see what {subject.label} keeps; `base` {subject.label} evaluates it alone."
    return find_base(subject.checkpoint, subject.label, hint)
