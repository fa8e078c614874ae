"""Evaluation of models, whole or under the interventions of plans, each beside the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain, product, zip_longest
from pathlib import Path
from typing import Any

import pyarrow as pa

from avss_dist.analysis.verdict import kept_by_guess, primary_metric
from avss_dist.core.errors import ConfigError
from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.names import PERPLEXITY, REALIZED, ROW_START, TRUTHFULQA
from avss_dist.core.results import TabularResult
from avss_dist.core.settings import DEFAULT_WAREHOUSE, Settings
from avss_dist.core.text import RedactedURI
from avss_dist.evaluation.events import OnEvent
from avss_dist.evaluation.held_out import refuse_overlap, texts_of_repair
from avss_dist.evaluation.session import (
    EvaluationSession,
    PlannedTask,
    Retention,
    about,
    evaluation_options,
    metrics,
)
from avss_dist.evaluation.subjects import Subject, read_subjects, with_bases
from avss_dist.evaluation.tasks import make_task, row_start_task
from avss_dist.models.checkpoints import Checkpoint
from avss_dist.options import PromptOptions
from avss_dist.runs.corpora import corpus_problems
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.sparsity.realized import RealizedSparsity
from avss_dist.stats.row_start import RowStarts
from avss_dist.tasks.base import Result
from avss_dist.warehouse.reader import Warehouse

HARNESS = ""
_TAKEN_BY = {
    **dict.fromkeys(("shuffle_seed", "chat_template"), (PERPLEXITY,)),
    "skip_questions": (TRUTHFULQA,),
    "limit": (TRUTHFULQA, HARNESS),
    **{field.name: (HARNESS,) for field in fields(PromptOptions)},
}
COLUMNS = (
    "subject",
    "dropped",
    "task",
    "metric",
    "value",
    "stderr",
    "whole",
    "retention",
    "retention_low",
    "retention_high",
)
_Key = tuple[str, str]  # revision and task


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A metric of one subject on a task, and the same metric of the whole model.

    Attributes:
        whole: metric of the whole model; None for the whole model itself.
        retained: retention of the metric; None for the whole model itself.
    """

    subject: Subject
    task: str
    result: Result
    whole: Result | None
    retained: Retention | None

    def metrics(self) -> list[tuple[str, float, float]]:
        """Return name, value and standard error of the metric; for a loss, also those of its perplexity."""
        return list(metrics(self.result))

    def whole_metrics(self) -> list[float]:
        """Return the values of the whole model in the order of `metrics`; empty for the whole model itself."""
        return [value for _, value, _ in metrics(self.whole)] if self.whole else []


class Evaluations(list[Evaluation], TabularResult):
    """Evaluations of several subjects, in their order and that of the tasks.

    Attributes:
        findings: sentences for people, on missing base models, realized sparsities, guesses and starts of rows.
    """

    _bars = ("retention",)
    __repr__ = TabularResult.__repr__

    def __init__(self, found: Iterable[Evaluation], *, findings: Iterable[str] = ()) -> None:
        super().__init__(found)
        self.findings = tuple(findings)

    def table(self) -> pa.Table:
        """Return a table with a row for each subject, task and metric."""
        rows = []
        for one in self:
            left = one.retained
            interval = (left.value, left.low, left.high) if left else (None, None, None)
            for (metric, value, stderr), whole in zip_longest(one.metrics(), one.whole_metrics()):
                dropped = list(map(str, one.subject.intervention.removed))
                values = (one.subject.label, dropped, one.task, metric, value, stderr, whole, *interval)
                rows.append(dict(zip(COLUMNS, values, strict=True)))
        return pa.Table.from_pylist(rows)


def evaluate(
    subjects: Sequence[str],
    *,
    tasks: Sequence[str],
    warehouse: str | Path = DEFAULT_WAREHOUSE,
    skip_sequences: int = 0,
    skip_questions: int = 0,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    system_instruction: str | None = None,
    fewshot_as_multiturn: bool = False,
    sparse: str | None = None,
    base: str | None = None,
    allow_overlap: bool = False,
    reporter: OnEvent | None = None,
    **options: Any,
) -> Evaluations:
    """Evaluate models and plans on tasks, and keep the results in a warehouse; what is measured is not repeated.

    Args:
        subjects: hub ids, folders, ``.gguf`` files; or plans, files that end in ``.yaml`` or ``.yml``, each beside its
            whole model, which is evaluated too.
        tasks: ``perplexity:CORPUS``; else a task of lm-evaluation-harness, by its name or its YAML file.
        skip_sequences: rows at the start of each corpus that are not read.
        skip_questions: questions of TruthfulQA that are not asked, the first ones.
        limit: documents of lm-evaluation-harness, questions of TruthfulQA, at most.
        num_fewshot, apply_chat_template, system_instruction, fewshot_as_multiturn: what stands around each document of
            lm-evaluation-harness, as `options.PromptOptions` has it.
        sparse: a sparsity plan, which every subject is evaluated with, too.
        base: the model that the models among the subjects were made of, which is evaluated too; by default the one that
            the model card of a pruned checkpoint names.
        allow_overlap: evaluate on text that a plan's scores were measured on, or a repair was fitted on, all the same.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`); what was measured is kept.
    """
    settings, execution = evaluation_options(dict(options))
    prompting = PromptOptions(
        num_fewshot=num_fewshot,
        apply_chat_template=apply_chat_template,
        system_instruction=system_instruction,
        fewshot_as_multiturn=fewshot_as_multiturn,
    )
    _require_used(tasks, skip_questions=skip_questions or None, limit=limit, **prompting.changes())
    _require_used(tasks, shuffle_seed=settings.shuffle_seed, chat_template=settings.chat_template or None)
    _require_readable(tasks, settings)
    tasks = [RedactedURI(task) for task in tasks]
    found = read_subjects(subjects, sparse, settings)
    for subject, name in product(found, tasks):
        sparsity = subject.intervention.sparsity
        require_effect(sparsity.rule if sparsity else None, name, f"{subject.label}: ")
    found, unknown = with_bases(found, base, trust_remote_code=settings.trust_remote_code)
    with EvaluationSession.open(warehouse, settings, execution, reporter) as session:
        planned: dict[_Key, PlannedTask] = {}
        for checkpoint in _checkpoints(found):
            model = session.place(checkpoint, settings)
            for name in tasks:
                task = make_task(
                    checkpoint,
                    name,
                    model.settings,
                    skip_sequences=skip_sequences,
                    skip_questions=skip_questions,
                    limit=limit,
                    prompting=prompting,
                )
                planned[checkpoint.revision, name] = model.plan(task)
        _require_same_tokens(found, tasks, planned)
        if not allow_overlap:
            _refuse_overlaps(found, planned, Warehouse(warehouse))
        starts = _plan_starts(planned)
        work = [(one, _interventions(found, one.checkpoint)) for one in planned.values()]
        results = session.measure([*work, *((start, [NO_INTERVENTION]) for start in starts)])
    every = {key: results[one] for key, one in planned.items()}
    evaluations = list(_all_against_whole(found, tasks, every))
    row_starts = _row_starts((start, results[start]) for start in starts)
    notes = [*unknown, *_findings(found, tasks, every), *_guesses(evaluations), *row_starts]
    return Evaluations(evaluations, findings=notes)


def _plan_starts(planned: Mapping[_Key, PlannedTask]) -> list[PlannedTask]:
    """Return the comparison of two starts of rows for each text and whole model that has another start."""
    starts = []
    for (_, name), one in planned.items():
        if name.startswith(PERPLEXITY) and (task := row_start_task(one.checkpoint, one.task, one.settings)):
            starts.append(replace(one, task=task))
    return starts


def _require_used(tasks: Sequence[str], **given: Any) -> None:
    """Refuse options that no task takes."""
    kinds = {next((kind for kind in (PERPLEXITY, TRUTHFULQA) if task.startswith(kind)), HARNESS) for task in tasks}
    for name, value in given.items():
        if value is not None and not kinds & set(_TAKEN_BY[name]):
            raise ConfigError(f"`{name}` has no effect on {', '.join(map(RedactedURI, tasks))}.", "Leave it out.")


def _require_readable(tasks: Sequence[str], settings: Settings) -> None:
    """Refuse texts that cannot be read with the settings."""
    texts = [RedactedURI(task).full.removeprefix(PERPLEXITY) for task in tasks if task.startswith(PERPLEXITY)]
    for _, problem in corpus_problems(texts, {settings.chat_template}):
        raise problem


def _all_against_whole(
    subjects: Sequence[Subject], tasks: Sequence[str], every: Mapping[_Key, Sequence[Result]]
) -> Iterator[Evaluation]:
    """Yield the metrics of every subject on every task, beside those of the whole model."""
    for subject, name in product(subjects, tasks):
        yield from against_whole(
            subject,
            name,
            every[subject.checkpoint.revision, name],
            every[(subject.base or subject.checkpoint).revision, name],
        )


def _findings(
    subjects: Sequence[Subject], tasks: Sequence[str], every: Mapping[_Key, Sequence[Result]]
) -> Iterator[str]:
    """Yield a sentence on the realized sparsity of each sparsity plan on each task."""
    for subject, name in product(subjects, tasks):
        if sparse := subject.sparsity_plan:
            results = every[subject.checkpoint.revision, name]
            if near := realized(sparse, results, subject.intervention):
                yield f"{subject.label}, {name}: {near.finding}"


def _guesses(evaluations: Iterable[Evaluation]) -> Iterator[str]:
    """Yield a sentence on the retention of a guess, for each task and whole model that a subject is compared with."""
    whole: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for one in evaluations:
        if one.whole:
            compared = one.subject.base or one.subject.checkpoint
            rows = whole.setdefault((compared.name, one.task), [])
            rows.append({"score": None, "metric": one.whole.metric, "value": one.whole.value})
    for (model, task), rows in whole.items():
        metric = primary_metric(rows)
        if guess := kept_by_guess(rows, metric):
            yield f"{task}: a guess keeps {guess:z.1%} of the {metric} of {model}."


def _row_starts(compared: Iterable[tuple[PlannedTask, Sequence[Result]]]) -> Iterator[str]:
    """Yield a sentence for each text that is far likelier with another start of its rows."""
    for planned, results in compared:
        starts = RowStarts.of_losses({result.metric: result.value for result in results if not result.removed})
        corpus = planned.task.name.removeprefix(ROW_START)
        if starts and (sentence := starts.describe(planned.checkpoint.name, corpus)):
            yield sentence


def realized(plan: SparsityPlan, results: Iterable[Result], intervention: Intervention) -> RealizedSparsity | None:
    """Return planned and realized sparsity of a plan's linear maps, compared under an intervention that applies it."""
    measured = {
        (one.layer, one.metric.removeprefix(REALIZED)): one.value
        for one in results
        if one.layer is not None and one.intervention == intervention.key and one.metric.startswith(REALIZED)
    }
    return RealizedSparsity.compare(plan, measured)


def _refuse_overlaps(subjects: Sequence[Subject], planned: Mapping[_Key, PlannedTask], warehouse: Warehouse) -> None:
    """Refuse text that layers were scored or searched on, or that a repaired checkpoint was fitted on."""
    for checkpoint in {one.checkpoint.revision: one.checkpoint for one in planned.values()}.values():
        tasks = [one.task for (revision, _), one in planned.items() if revision == checkpoint.revision]
        mine = (subject for subject in subjects if subject.checkpoint.revision == checkpoint.revision)
        plans = (text for subject in mine for text in subject.seen_texts(warehouse))
        refuse_overlap(tasks, chain(texts_of_repair(checkpoint), plans))


def _interventions(subjects: Sequence[Subject], checkpoint: Checkpoint) -> list[Intervention]:
    """Return the interventions under which a checkpoint is evaluated, by evaluation, the unchanged model first."""
    mine = [subject.intervention for subject in subjects if subject.checkpoint.revision == checkpoint.revision]
    evaluations = dict.fromkeys([NO_INTERVENTION.split()[0], *(one.split()[0] for one in mine)])
    return [one for changes in evaluations for one in [NO_INTERVENTION, *mine] if one.split()[0] == changes]


def _checkpoints(subjects: Sequence[Subject]) -> list[Checkpoint]:
    """Return every model that is opened: those of the subjects, and their base models."""
    every = [one for subject in subjects for one in (subject.checkpoint, subject.base) if one]
    return [*{checkpoint.revision: checkpoint for checkpoint in every}.values()]


def _require_same_tokens(
    subjects: Sequence[Subject], tasks: Sequence[str], planned: Mapping[_Key, PlannedTask]
) -> None:
    """Refuse a base model that reads a task in other tokens: its numbers are of other samples."""
    for subject, name in product(subjects, tasks):
        if subject.base is None:
            continue
        keys = {planned[one.revision, name].task.key for one in (subject.checkpoint, subject.base)}
        if len(keys) > 1:
            raise ConfigError(
                f"{subject.base.name} and {subject.label} read {RedactedURI(name)} in different tokens.",
                "Name the model that it was made of with `base`.",
            )


def require_effect(rule: str | None, task: str, where: str = "") -> None:
    """Raise ConfigError for a text as a task under a rule that leaves prompts dense, since a text is one prompt.

    Args:
        where: start of the message, which names the file of the rule.
    """
    if rule == "dense-prefill" and task.startswith(PERPLEXITY):
        raise ConfigError(
            f"{where}{RedactedURI(task)} is a prompt, and the rule dense-prefill makes nothing of a prompt sparse.",
            "Evaluate a task that generates, or make the plan with another rule.",
        )


def against_whole(
    subject: Subject, task: str, results: Sequence[Result], of_whole_model: Sequence[Result]
) -> list[Evaluation]:
    """Return the metrics of a task about a subject, each beside that of the whole model.

    Args:
        of_whole_model: results that include those of the unchanged model, or of the base model if there is one.
    """
    whole = {result.metric: result for result in about(of_whole_model)}
    changed = bool(subject.intervention) or subject.base is not None
    evaluations = []
    for result in about(results, subject.intervention.key):
        of_whole = whole.get(result.metric) if changed else None
        left = Retention.of(of_whole, result) if of_whole else None
        evaluations.append(Evaluation(subject=subject, task=task, result=result, whole=of_whole, retained=left))
    return evaluations
