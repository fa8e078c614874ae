"""Evaluate models, whole or without layers: plan cells, skip what is measured, run the rest, combine the results."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow.compute as pc

from avss_dist.corpus.shards import CorpusPlan, plan
from avss_dist.errors import AvssError, RunFailed
from avss_dist.evaluation.held_out import refuse_overlap
from avss_dist.evaluation.retention import Retained, retained
from avss_dist.executors.base import Executor
from avss_dist.executors.open import open_executor
from avss_dist.models.checkpoints import Checkpoint, resolve
from avss_dist.models.loading import load_tokenizer, pin, text_config
from avss_dist.pruning.plan import read_plan
from avss_dist.pruning.selection import PlanError
from avss_dist.settings import LOSS, PERPLEXITY, SCHEMA_VERSION, Settings, fingerprint, split_options
from avss_dist.system.versions import package_versions
from avss_dist.tasks.base import Result, Task, TextLoss, combine, require_whole_model
from avss_dist.tasks.cells import Cell, CellResult
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

NOT_NUMBERS = ("max_sequences", "sequences_per_shard", "sites", "thresholds", "layout", "trust_remote_code")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is evaluated: a model, and the layers that are left out of it.

    Attributes:
        label: what people call it.
        run_id: the run whose scores chose the layers; its text is no text to evaluate on.
    """

    checkpoint: Checkpoint
    label: str
    drop: tuple[int, ...] = ()
    run_id: str | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task of one checkpoint, planned: which evaluation it is, and how it is measured."""

    run_id: str
    checkpoint: Checkpoint
    settings: Settings
    task: Task

    def cells(self, drops: Iterable[tuple[int, ...]]) -> list[Cell]:
        """A cell for each part of the task and each set of layers to leave out; each once."""
        return [
            Cell(
                run_id=self.run_id,
                checkpoint=self.checkpoint,
                settings=self.settings,
                task=self.task.name,
                part=part,
                measure=measure,
                drop=drop,
            )
            for drop in dict.fromkeys(drops)
            for part, measure in enumerate(self.task.parts)
        ]


class CellReporter(Protocol):
    """Told how an evaluation goes."""

    def started(self, cells: int, done: int) -> None: ...
    def advanced(self, cell: Cell) -> None: ...


class SilentCells:
    """Says nothing."""

    def started(self, cells: int, done: int) -> None: ...
    def advanced(self, cell: Cell) -> None: ...


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
        allow_overlap: evaluate on text that a plan's scores were measured on, all the same.
        options: the fields of ``config.Settings`` and ``config.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed (`RunFailed`); what was measured is kept.
    """
    settings, execution = split_options(options)
    require_whole_model(execution)
    tasks = [RedactedURI(task) for task in tasks]
    store, scored = Store(warehouse), Warehouse(warehouse)
    store.create()
    found = [read_subject(text, trust_remote_code=settings.trust_remote_code) for text in subjects]
    with closing(open_executor(execution, settings)) as executor:
        asked: dict[tuple[str, str], Asked] = {}
        for subject in found:
            checkpoint = subject.checkpoint
            fixed = pinned(settings, checkpoint, executor.device)
            for name in tasks:
                if (checkpoint.revision, name) not in asked:
                    task = make_task(
                        checkpoint, name, fixed, skip_sequences=skip_sequences, limit=limit, num_fewshot=num_fewshot
                    )
                    asked[checkpoint.revision, name] = ask(checkpoint, task, fixed)
                if subject.run_id and not allow_overlap:
                    refuse_overlap(asked[checkpoint.revision, name].task, subject.run_id, scored, checkpoint)
        drops = {revision: [(), *(s.drop for s in found if s.checkpoint.revision == revision)] for revision, _ in asked}
        cells = [cell for (revision, _), one in asked.items() for cell in one.cells(drops[revision])]
        failed = measure(cells, store, executor, reporter, fresh=execution.fresh)
    every = {key: commit(one, store) for key, one in asked.items()}
    if failed:
        raise failure(failed)
    return [
        evaluation
        for subject in found
        for name in tasks
        for evaluation in compared(subject, name, every[subject.checkpoint.revision, name])
    ]


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
    return Subject(checkpoint=checkpoint, label=text, drop=made.drop, run_id=made.run_id)


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
        AvssError: there is none such, or its data cannot be had.
    """
    if name.startswith(PERPLEXITY):
        corpus = RedactedURI(name).full.removeprefix(PERPLEXITY)
        return text_task(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    from avss_dist.tasks.harness import harness_task

    return harness_task(name, limit=limit, num_fewshot=num_fewshot, trust_remote_code=settings.trust_remote_code)


def compared(subject: Subject, task: str, found: Sequence[Result]) -> list[Evaluation]:
    """The metrics of a task about a subject as a whole, each beside that of the whole model."""
    whole = {result.metric: result for result in found if result.drop == () and result.layer is None}
    return [
        Evaluation(
            subject=subject,
            task=task,
            result=result,
            retained=retained(whole[result.metric], result) if subject.drop and result.metric in whole else None,
        )
        for result in found
        if result.drop == subject.drop and result.layer is None
    ]


def failure(failed: Sequence[tuple[Cell, AvssError]]) -> AvssError:
    """One error that tells of all cells that failed: the first mistake, else that they failed."""
    cell, error = next(((c, e) for c, e in failed if not isinstance(e, RunFailed)), failed[0])
    what = f"{cell.task} of {cell.checkpoint.name}" + (f" without layers {list(cell.drop)}" if cell.drop else "")
    others = f" {len(failed) - 1} more failed." if len(failed) > 1 else ""
    return type(error)(f"{what}: {error.message}{others}", error.hint or "Run the same command again.")


def ask(checkpoint: Checkpoint, task: Task, settings: Settings) -> Asked:
    """A task of a checkpoint; ``settings`` are `pinned`. The same id is the same evaluation."""
    numbers = {name: value for name, value in settings.as_dict().items() if name not in NOT_NUMBERS}
    print_ = fingerprint(schema=SCHEMA_VERSION, checkpoint=checkpoint.revision, task=task.key, settings=numbers)
    run_id = f"{checkpoint.slug}-{print_[:10]}"
    return Asked(run_id=run_id, checkpoint=checkpoint, settings=settings, task=task)


def pinned(settings: Settings, checkpoint: Checkpoint, device: str) -> Settings:
    """Settings with every ``auto`` decided; refuses rows that the model cannot read."""
    config = text_config(checkpoint, trust_remote_code=settings.trust_remote_code)
    return pin(settings, checkpoint, config, device)


def text_task(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> Task:
    """The loss on a corpus, in the checkpoint's tokens.

    Raises:
        CorpusError: it cannot be read, or is too short.
    """
    text = plan_text(checkpoint, corpus, settings, skip_sequences=skip_sequences)
    return Task(name=f"{PERPLEXITY}{RedactedURI(corpus)}", parts=tuple(TextLoss(shard) for shard in text.shards))


def plan_text(checkpoint: Checkpoint, corpus: str, settings: Settings, *, skip_sequences: int = 0) -> CorpusPlan:
    """The rows of a corpus after the first ``skip_sequences``, in the checkpoint's tokens."""
    tokenizer = load_tokenizer(checkpoint, trust_remote_code=settings.trust_remote_code)
    return plan(corpus, tokenizer, settings, skip_sequences=skip_sequences)


def measure(
    cells: Sequence[Cell],
    store: Store,
    executor: Executor,
    reporter: CellReporter | None = None,
    *,
    fresh: bool = False,
) -> list[tuple[Cell, AvssError]]:
    """Measure the cells that are not in the warehouse yet, and keep each as it comes; returns those that failed.

    Raises:
        AvssError: the workers or the warehouse failed; what was measured is kept.
    """
    reporter = reporter or SilentCells()
    wanted = {(cell.run_id, cell.cell_id): cell for cell in cells}
    done = set() if fresh else {(run, cell) for run in {run for run, _ in wanted} for cell in store.cell_ids(run)}
    missing = [cell for key, cell in wanted.items() if key not in done]
    reporter.started(len(wanted), len(wanted) - len(missing))
    failed: list[tuple[Cell, AvssError]] = []
    with closing(executor.run_cells(missing)) as outcomes:
        for cell, outcome in outcomes:
            if isinstance(outcome, AvssError):
                failed.append((cell, outcome))
            else:
                store.write_cell(_identity(cell, outcome.family), cell.cell_id, _rows(cell, outcome))
            reporter.advanced(cell)
    return failed


def commit(asked: Asked, store: Store) -> list[Result]:
    """Write what all cells of an evaluation say to ``evaluations``; of a loss, its perplexity too."""
    if not store.cell_ids(asked.run_id):
        return []
    rows = store.table("cells", where=pc.field("run_id") == asked.run_id).to_pylist()
    found = combine(rows, len(asked.task.parts))
    if found:
        seconds = {(tuple(r["drop"]), r["layer"]): 0.0 for r in rows}
        for row in rows:
            seconds[tuple(row["drop"]), row["layer"]] += row["seconds"] or 0.0
        common = {
            "task": asked.task.name,
            "settings": json.dumps({**asked.settings.as_dict(), **asked.task.options}),
            "versions": package_versions(),
            "created_at": datetime.now(UTC),
        }
        of = RunIdentity(
            run_id=asked.run_id,
            model=asked.checkpoint.name,
            revision=asked.checkpoint.revision,
            family=rows[0]["family"],
        )
        store.write_evaluations(
            of,
            [
                {**common, **row, "seconds": seconds[result.drop, result.layer]}
                for result in found
                for row in _metric_rows(result)
            ],
        )
    return found


def metrics(result: Result) -> Iterator[tuple[str, float, float]]:
    """Name, value and standard error of a result; of a loss, of its perplexity too (by the delta method)."""
    yield result.metric, result.value, result.stderr
    if result.metric == LOSS:
        perplexity = float(np.exp(result.value))
        yield "perplexity", perplexity, perplexity * result.stderr


def _metric_rows(result: Result) -> Iterator[dict[str, Any]]:
    fields = {"drop": list(result.drop), "layer": result.layer, "num_samples": len(result.samples)}
    for metric, value, stderr in metrics(result):
        yield {**fields, "metric": metric, "value": value, "stderr": stderr}


def _identity(cell: Cell, family: str) -> RunIdentity:
    of = cell.checkpoint
    return RunIdentity(run_id=cell.run_id, model=of.name, revision=of.revision, family=family)


def _rows(cell: Cell, measured: CellResult) -> list[Mapping[str, Any]]:
    share = measured.seconds / max(1, len(measured.rows))
    return [
        {
            "task": cell.task,
            "metric": row.metric,
            "drop": list(cell.drop if row.drop is None else row.drop),
            "layer": row.layer,
            "part": cell.part,
            "samples": row.samples.tolist(),
            "weights": row.weights.tolist(),
            "device": measured.device,
            "seconds": share,
            "created_at": datetime.now(UTC),
        }
        for row in measured.rows
    ]
