"""Tables and lines on a shrunk model: retention against the whole model, and by the number of dropped layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import progress as rich_progress
from rich.console import Group, RenderableType

from avss_dist.core.intervention import count_removed, describe_removed
from avss_dist.core.names import PERPLEXITY, REPAIR
from avss_dist.core.text import basename, describe_bytes
from avss_dist.distillation.events import HeldOutMeasured, Preparing, TrainingAdvanced
from avss_dist.evaluation.events import (
    CellDone,
    CellsStarted,
    CellUnderway,
    Event,
)
from avss_dist.report.section import BarColumn, ReportColumn, ReportTable, interval, known_interval, percent
from avss_dist.report.terminal.distill import DistillProgress
from avss_dist.report.terminal.progress import CellProgress, LogLines, StepPace, bars, describe_without, log
from avss_dist.report.terminal.tables import FittedTable
from avss_dist.runs.events import RunStarted, ShardMeasured
from avss_dist.stats.metrics import NO_INTERVAL

if TYPE_CHECKING:
    from avss_dist.evaluation.continuations import Continuation
    from avss_dist.evaluation.shrink import Shrunk, TaskRetention
    from avss_dist.tasks.cells import Cell

BAR = 40  # cells of what keeps all


class ShrinkProgress(CellProgress):
    """Callback for the events of `shrink`: one bar over all steps. Without a terminal, a line for each step."""

    def __init__(self) -> None:
        self._progress = bars(rich_progress.TaskProgressColumn())
        self._bar = self._progress.add_task("reading", total=None)
        self._distilling = DistillProgress(self._progress, self._bar)
        self._log = LogLines(self._progress)
        self._begin_step("reading", 1, 1)
        self._notes: set[str] = set()

    def __call__(self, event: Event) -> None:
        """Show an event."""
        match event:
            case RunStarted(_, num_tokens, done_tokens):
                self._begin_step("scoring layers", num_tokens, done_tokens, "tokens")
            case ShardMeasured(_, num_tokens):
                self._advance(num_tokens)
            case CellsStarted(cells, done) if cells:
                self._begin_step(_step(cells[0]), len(cells), done, "evaluations")
            case CellUnderway(_, step, share):
                what = f"{step[0].lower()}{step[1:]}, {share:.0%}"
                self._progress.update(self._bar, description=what)
                self._log(f"{what}{self._pace.describe()}")
            case CellDone(cell, notes):
                self._print_notes(notes)
                self._progress.update(self._bar, description=_step(cell))
                self._advance(1)
            case Preparing() | TrainingAdvanced() | HeldOutMeasured():
                self._distilling(event)

    def _begin_step(self, what: str, total: int, done: int, unit: str = "") -> None:
        """Begin a step of ``total`` units, of which ``done`` are done."""
        self._progress.reset(self._bar, total=total, completed=done, description=what)
        self._done, self._cells, self._step = done, total, what
        self._pace = StepPace(total, done, unit)
        if self._progress.disable and done != total:
            log(what)

    def _advance(self, amount: int) -> None:
        """Count finished units of a step."""
        self._progress.update(self._bar, advance=amount)
        self._done += amount
        self._pace.reach(self._done)
        self._log(f"{self._step}: {self._done / self._cells:.0%}{self._pace.describe()}")


def _step(cell: Cell) -> str:
    return f"{'fitting the repair' if cell.task.startswith(REPAIR) else 'evaluating'}{describe_without(cell)}"


def shrunk_tables(done: Shrunk) -> RenderableType:
    """Return tables of the metrics of the models, of the curve of several plans, and of continuations."""
    plan, tasks = done.best.plan, done.best.tasks
    rows = ["whole model", f"{count_removed(plan.drop)} dropped"]
    rows += [f"repaired by {done.record.repair}"] if done.record else []
    rows += [f"distilled on {done.distillation.after.tokens:,} tokens"] if done.distillation else []
    table = ReportTable(
        columns=[
            ReportColumn("", rows, number=False),
            *(column for task in tasks for column in _task_columns(task)),
        ],
        title=f"{basename(plan.model)} without {len(plan.drop)} of its {plan.num_layers} layers",
        caption=_caption(tasks),
    )
    more = [_curve(done)] if len(done.curve) > 1 else []
    more += [*continuation_tables(done.continuations)]
    return Group(FittedTable(table), *map(FittedTable, more))


def continuation_tables(continuations: Sequence[Continuation]) -> Iterator[ReportTable]:
    """Yield a table for each prompt, with a row for each model."""
    for prompt in dict.fromkeys(one.prompt for one in continuations):
        of_prompt = [one for one in continuations if one.prompt == prompt]
        texts = [" ".join(one.text.split()) for one in of_prompt]
        yield ReportTable(
            title=f"Greedy continuation of: {' '.join(prompt.split())}",
            columns=[
                ReportColumn("model", [one.variant for one in of_prompt], number=False, wraps=True),
                ReportColumn("continuation", texts, number=False, wraps=True),
            ],
        )


def _caption(tasks: Sequence[TaskRetention]) -> str:
    """Return the caption: meaning of the columns, and the reason for a missing interval."""
    text = "Kept: of the whole model's metric (of a perplexity: whole over this), and its 95% interval."
    results = [(task, result) for task in tasks for result in task.smaller]
    return text if all(task.of(result).has_interval for task, result in results) else f"{text} {NO_INTERVAL}"


def _task_columns(task: TaskRetention) -> Iterator[ReportColumn]:
    from avss_dist.evaluation.shrink import readable_metric

    results = [task.whole, *task.smaller]
    kept = [None, *(task.of(result) for result in results[1:])]
    metric, _ = readable_metric(task.whole)
    group = basename(task.task.removeprefix(PERPLEXITY))
    yield ReportColumn(metric, [readable_metric(result)[1] for result in results], group=group)
    yield ReportColumn("kept", [one and one.value for one in kept], percent(1), missing="")
    intervals = [one and known_interval(one.low, one.high) for one in kept]
    yield ReportColumn("95% interval", intervals, interval(percent(1)), priority=1)


def _curve(done: Shrunk) -> ReportTable:
    """Return a table of the retention of every plan that was tried, in the task with the lowest retention."""
    layers = done.best.plan.num_layers
    dropped, retentions = (
        [len(candidate.plan.drop) for candidate in done.curve],
        [candidate.kept for candidate in done.curve],
    )
    return ReportTable(
        columns=[
            ReportColumn("layers dropped", dropped),
            ReportColumn("share", [number / layers for number in dropped], percent(0)),
            ReportColumn("kept", retentions, percent(1)),
            BarColumn(values=retentions, largest=1.0, width=BAR),
        ],
        title=f"What is kept{' before distillation' if done.distillation else ''}, in the task in which the least is",
    )


def shrunk_values(done: Shrunk) -> dict[str, Any]:
    """Return the results of shrinking as plain values, for programs."""
    curve = [{"drop": one.plan.drop, "kept": one.kept} for one in done.curve]
    about = {"output": done.folder, "bytes": done.bytes, "drop": done.best.plan.drop, "kept": done.best.kept}
    tasks = [task.describe() for task in done.best.tasks]
    values = {**about, "tasks": tasks, "curve": curve, "difference": done.difference, "notes": [*done.notes]}
    texts = [{"prompt": one.prompt, "model": one.variant, "text": one.text} for one in done.continuations]
    values |= {"continuations": texts} if texts else {}
    return values | ({"distilled": _distilled_values(done)} if done.distillation else {})


def _distilled_values(done: Shrunk) -> list[dict[str, Any]]:
    """Return the retention of the distilled model in each task, with its interval."""
    retentions = {task.task: task.of(task.final) for task in done.best.tasks}
    return [{"task": name, "kept": kept.value, "low": kept.low, "high": kept.high} for name, kept in retentions.items()]


def shrunk_lines(done: Shrunk) -> Iterator[str]:
    """Yield lines on the written checkpoint: size, dropped layers, findings, repair, and notes."""
    plan = done.best.plan
    yield f"{done.folder}: {len(plan.keep)} of {plan.num_layers} layers, {describe_bytes(done.bytes)} of weights."
    yield f"Dropped {describe_removed(plan.drop)}, chosen by {plan.why['by']}."
    yield from (f"Finding: {line}" for line in plan.findings)
    yield from done.record.describe() if done.record else ()
    yield from done.distillation.describe() if done.distillation else ()
    yield from done.notes
