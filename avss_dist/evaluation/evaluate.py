"""Evaluate models, whole or without layers, each beside the whole model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avss_dist.evaluation.engine import (
    CellReporter,
    PlannedEvaluation,
    commit,
    evaluation_options,
    failure,
    measure,
    metrics,
    pinned,
    placed,
    plan_evaluation,
    plan_text,
)
from avss_dist.evaluation.held_out import refuse_overlap, refuse_repair_text, refuse_search_text
from avss_dist.evaluation.retention import Retained, retained
from avss_dist.executors.open import open_executor
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.pruning.plan import read_plan
from avss_dist.pruning.selection import PlanError
from avss_dist.settings import PERPLEXITY, SEARCHES, Settings
from avss_dist.tasks.base import Result, Task, TextLoss
from avss_dist.tasks.cells import Cell
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a model, and the layers and sublayers that are left out of it.

    Attributes:
        label: what people call it.
        run_id: the run whose scores chose the layers; its text is no text to evaluate on.
        search: the evaluation that searched them; nor is its text.
    """

    checkpoint: Checkpoint
    label: str
    drop: tuple[int, ...] = ()
    run_id: str | None = None
    search: str | None = None


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A metric of a task, of one subject, beside the same of the whole model.

    Attributes:
        retained: what is left of the whole model's; None of the whole model itself.
    """

    subject: Subject
    task: str
    result: Result
    retained: Retained | None

    def metrics(self) -> list[tuple[str, float, float]]:
        """Name, value and standard error: of a loss, its perplexity after it."""
        return list(metrics(self.result))


def evaluate(
    subjects: Sequence[str],
    *,
    tasks: Sequence[str],
    warehouse: str | Path,
    skip_sequences: int = 0,
    limit: int | None = None,
    num_fewshot: int | None = None,
    allow_overlap: bool = False,
    reporter: CellReporter | None = None,
    **options: Any,
) -> list[Evaluation]:
    """Evaluate models and plans on tasks, and keep the results in a warehouse; what is measured is not repeated.

    The whole model of a plan is evaluated too: it is what the plan is compared with.

    Args:
        subjects: hub ids, folders, ``.gguf`` files; or plans, files that end in ``.yaml`` or ``.yml``.
        tasks: ``perplexity:CORPUS``; else a task of lm-evaluation-harness, by its name or its YAML file.
        skip_sequences: rows at the start of each corpus that are not read.
        limit, num_fewshot: of lm-evaluation-harness: documents at most, and examples before each.
        allow_overlap: evaluate on text that a plan's scores were measured on, or a repair was fitted on, all the same.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`); what was measured is kept.
    """
    settings, execution = evaluation_options(options)
    tasks = [RedactedURI(task) for task in tasks]
    store = Store(warehouse)
    store.create()
    found = [read_subject(text, trust_remote_code=settings.trust_remote_code) for text in subjects]
    with closing(open_executor(execution, settings)) as executor:
        planned: dict[tuple[str, str], PlannedEvaluation] = {}
        for checkpoint in {subject.checkpoint.revision: subject.checkpoint for subject in found}.values():
            fixed = pinned(settings, checkpoint, executor.device)
            placement = placed(checkpoint, fixed, execution, executor)
            for name in tasks:
                task = make_task(
                    checkpoint, name, fixed, skip_sequences=skip_sequences, limit=limit, num_fewshot=num_fewshot
                )
                planned[checkpoint.revision, name] = plan_evaluation(checkpoint, task, fixed, placement)
        if not allow_overlap:
            _refuse_overlaps(found, planned, Warehouse(warehouse))
        cells = list(_cells(found, planned))
        failed = measure(cells, store, executor, reporter, fresh=execution.fresh)
    every = {key: commit(one, store) for key, one in planned.items()}
    if failed:
        raise failure(failed)
    return [
        evaluation
        for subject in found
        for name in tasks
        for evaluation in against_whole(subject, name, every[subject.checkpoint.revision, name])
    ]


def _refuse_overlaps(
    subjects: Sequence[Subject], planned: Mapping[tuple[str, str], PlannedEvaluation], warehouse: Warehouse
) -> None:
    """Refuse text that layers were scored or searched on, or a repaired checkpoint was fitted on."""
    for one in planned.values():
        refuse_repair_text(one.task, one.checkpoint)
    for subject in subjects:
        for (revision, _), one in planned.items():
            if subject.run_id and subject.checkpoint.revision == revision:
                refuse_overlap(one.task, subject.run_id, warehouse, subject.checkpoint)
            if subject.search and subject.checkpoint.revision == revision:
                refuse_search_text(one.task, subject.search, warehouse, subject.checkpoint)


def _cells(subjects: Sequence[Subject], planned: Mapping[tuple[str, str], PlannedEvaluation]) -> Iterator[Cell]:
    """The cells of every task on the whole models and on the subjects."""
    for (revision, _), one in planned.items():
        yield from one.cells([(), *(s.drop for s in subjects if s.checkpoint.revision == revision)])


def read_subject(text: str, *, trust_remote_code: bool = False) -> Subject:
    """A model, or the plan of a file, with the checkpoint that it is for.

    Raises:
        AvssError: there is none such, or the plan is for another checkpoint than its model is now.
    """
    if not text.endswith((".yaml", ".yml")):
        return Subject(checkpoint=resolve(text, trust_remote_code=trust_remote_code), label=text)
    made = read_plan(text)
    checkpoint = resolve(made.model, trust_remote_code=trust_remote_code)
    if made.revision is not None and made.revision != checkpoint.revision:
        raise PlanError(
            f"{text} is for {made.model} at {made.revision[:12]}; it is at {checkpoint.revision[:12]} now.",
            "Score it again, and make a plan of its own.",
        )
    search = str(made.why.get("evaluation", "")) if made.why.get("by") in SEARCHES else None
    return Subject(checkpoint=checkpoint, label=text, drop=made.removed, run_id=made.run_id, search=search)


def make_task(
    checkpoint: Checkpoint,
    name: str,
    settings: Settings,
    *,
    skip_sequences: int = 0,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> Task:
    """A task by its name.

    Raises:
        AvssError: there is none such, or its data could not be loaded.
    """
    if name.startswith(PERPLEXITY):
        corpus = RedactedURI(name).full.removeprefix(PERPLEXITY)
        return text_task(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    from avss_dist.tasks.harness import harness_task

    return harness_task(name, limit=limit, num_fewshot=num_fewshot, trust_remote_code=settings.trust_remote_code)


def against_whole(subject: Subject, task: str, found: Sequence[Result]) -> list[Evaluation]:
    """The metrics of a task about a subject as a whole, each beside that of the whole model."""
    found = [result for result in found if result.layer is None and result.patch is None]
    whole = {result.metric: result for result in found if result.drop == ()}
    return [
        Evaluation(
            subject=subject,
            task=task,
            result=result,
            retained=retained(whole[result.metric], result) if subject.drop and result.metric in whole else None,
        )
        for result in found
        if result.drop == subject.drop
    ]


def text_task(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> Task:
    """The loss on a corpus, in the checkpoint's tokens.

    Raises:
        CorpusError: it cannot be read, or is too short.
    """
    text = plan_text(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    return Task(name=f"{PERPLEXITY}{RedactedURI(corpus)}", parts=tuple(TextLoss(shard) for shard in text.shards))
