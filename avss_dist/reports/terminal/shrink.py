"""Tables and lines on a shrunk or distilled model: retention against the whole model, by task, tokens and layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType

from avss_dist.analysis.section import (
    BarColumn,
    ReportColumn,
    ReportRow,
    ReportTable,
    interval,
    known_interval,
)
from avss_dist.core.intervention import count_removed, describe_removed
from avss_dist.core.text import basename, describe_bytes
from avss_dist.core.values import NewRow
from avss_dist.reports.terminal.speed import speed_table
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.metrics import NO_INTERVAL
from avss_dist.warehouse.names import PERPLEXITY
from avss_dist.warehouse.reader import grouped

if TYPE_CHECKING:
    from avss_dist.distillation.curve import CurvePoint
    from avss_dist.distillation.distill import Distilled
    from avss_dist.evaluation.continuations import Continuation
    from avss_dist.studies.shrunk import Shrunk, TaskRetention


PERCENT = "{:z.1%}".format
CURVE_WIDTH = 40  # cells of the bars of a curve
_CURVE_COLUMNS = (
    ReportColumn("layers dropped", "dropped"),
    ReportColumn("share", "share", "{:z.0%}".format),
    ReportColumn("kept", "kept", PERCENT),
    BarColumn(key="kept", largest=1.0, width=CURVE_WIDTH),
)
_CONTINUATION_COLUMNS = (
    ReportColumn("model", "model", number=False, wraps=True),
    ReportColumn("continuation", "continuation", number=False, wraps=True),
)


def shrunk_tables(done: Shrunk) -> RenderableType:
    """Return tables of the metrics of the models, the curve of several plans, continuations, and speed."""
    tables = [_models_table(done)]
    if len(done.curve) > 1:
        tables.append(_curve_table(done))
    tables += continuation_tables(done.continuations)
    shown: list[RenderableType] = [FittedTable(table) for table in tables]
    if done.speed:
        shown.append(speed_table(done.speed))
    return Group(*shown)


def _models_table(done: Shrunk) -> ReportTable:
    """Return a table with a row for the whole model and each smaller one, and columns for each task."""
    plan = done.best.plan
    titles = {"whole": "whole model", "pruned": f"{count_removed(plan.drop)} dropped"}
    if done.record:
        titles["repaired"] = f"repaired by {done.record.repair}"
    if done.distillation:
        titles["distilled"] = f"distilled on {done.distillation.after.tokens:,} tokens"
    columns = [ReportColumn("", "model", number=False)]
    for task in done.best.tasks:
        columns += _task_columns(task)
    caption = "Kept: of the whole model's metric (of a perplexity: whole over this), and its 95% interval."
    if not all(_has_intervals(task) for task in done.best.tasks):
        caption += f" {NO_INTERVAL}"
    return ReportTable(
        columns=columns,
        rows=[_model_row(model, title, done.best.tasks) for model, title in titles.items()],
        title=f"{basename(plan.model)} without {len(plan.drop)} of its {plan.num_layers} layers",
        caption=caption,
    )


def _has_intervals(task: TaskRetention) -> bool:
    """Whether the interval of every retention of a task is known."""
    return all(retention.has_interval for retention in task.retentions.values())


def _task_columns(task: TaskRetention) -> list[ReportColumn]:
    """Return the columns of a task: its metric, and the retention of it with its interval."""
    metric, _, _ = task.results["whole"].metrics()[-1]
    group = basename(task.task.removeprefix(PERPLEXITY))
    return [
        ReportColumn(metric, f"{task.task}: value", group=group),
        ReportColumn("kept", f"{task.task}: kept", PERCENT, missing=""),
        ReportColumn("95% interval", f"{task.task}: interval", interval(PERCENT), priority=1),
    ]


def _model_row(model: str, title: str, tasks: Sequence[TaskRetention]) -> ReportRow:
    """Return the row of a model. The whole one, with which the others are compared, has no retention.

    Args:
        model: name of the model in `TaskRetention.results`.
    """
    values: NewRow = {"model": title}
    for task in tasks:
        _, value, _ = task.results[model].metrics()[-1]
        values[f"{task.task}: value"] = f"{value:z,.4g}"
        values[f"{task.task}: kept"] = None
        values[f"{task.task}: interval"] = None
        if model in task.retentions:
            retention = task.retentions[model]
            values[f"{task.task}: kept"] = retention.value
            values[f"{task.task}: interval"] = known_interval(retention.low, retention.high)
    return ReportRow(values)


def _curve_table(done: Shrunk) -> ReportTable:
    """Return a table with a row for each plan that was tried."""
    when = " before distillation" if done.distillation else ""
    num_layers = done.best.plan.num_layers
    rows = []
    for point in done.curve:
        dropped = len(point.plan.drop)
        rows.append(ReportRow({"dropped": dropped, "share": dropped / num_layers, "kept": point.kept}))
    return ReportTable(
        columns=_CURVE_COLUMNS, rows=rows, title=f"What is kept{when}, in the task in which the least is"
    )


def continuation_tables(continuations: Sequence[Continuation]) -> Iterator[ReportTable]:
    """Yield a table for each prompt, with a row for each model."""
    for prompt, same in grouped(continuations, itemgetter("prompt")).items():
        rows = []
        for continuation in same:
            text = " ".join(continuation["text"].split())
            rows.append(ReportRow({"model": continuation["model"], "continuation": text}))
        title = f"Greedy continuation of: {' '.join(prompt.split())}"
        yield ReportTable(title=title, columns=_CONTINUATION_COLUMNS, rows=rows)


def shrunk_values(done: Shrunk) -> NewRow:
    """Return the results of shrinking as plain values, for programs."""
    values = {
        "output": done.folder,
        "bytes": done.bytes,
        "drop": done.best.plan.drop,
        "kept": done.best.kept,
        "tasks": [task.describe() for task in done.best.tasks],
        "curve": [{"drop": point.plan.drop, "kept": point.kept} for point in done.curve],
        "difference": done.difference,
        "notes": [*done.notes],
    }
    if done.continuations:
        values["continuations"] = [*done.continuations]
    if done.distillation:
        values["distilled"] = [_final_values(task) for task in done.best.tasks]
    if done.speed:
        values["speed"] = done.speed.table().to_pylist()
    return values


def _final_values(task: TaskRetention) -> NewRow:
    """Return what the last model keeps of a task as plain values."""
    final = task.final
    return {"task": task.task, "kept": final.value, "low": final.low, "high": final.high}


def shrunk_lines(done: Shrunk) -> Iterator[str]:
    """Yield lines on the written checkpoint: size, dropped layers, findings, repair, and notes."""
    plan = done.best.plan
    yield f"{done.folder}: {len(plan.keep)} of {plan.num_layers} layers, {describe_bytes(done.bytes)} of weights."
    yield f"Dropped {describe_removed(plan.drop)}, chosen by {plan.why['by']}."
    for finding in plan.findings:
        yield f"Finding: {finding}"
    if done.record:
        yield from done.record.describe()
    if done.distillation:
        yield from done.distillation.describe()
    yield from done.notes


def distilled_table(done: Distilled) -> ReportTable:
    """Return a table with a row for each evaluation: loss, and what is kept of each text."""
    record = done.record
    columns = [
        ReportColumn("tokens", "tokens", number=False),
        ReportColumn("divergence", "divergence", "{:z.3g}".format),
    ]
    for text in record.texts:
        group = text.label if text.trained_rows else f"{text.label}, watched"
        columns += [
            ReportColumn("kept", f"{text.label}: kept", PERCENT, group=group),
            ReportColumn("perplexity", f"{text.label}: perplexity", "{:z.4g}".format, group=group, priority=1),
        ]
    rows = [_point_row(point, f"{point.tokens:,}") for point in record.curve[:-1]]
    rows.append(_point_row(record.curve[-1], f"{record.after.tokens:,}, as written"))
    return ReportTable(
        columns=columns,
        rows=rows,
        title=f"{record.student}, distilled from {record.teacher}",
        caption="On rows that are not trained on; kept: the teacher's perplexity over the student's; divergence: from "
        "the teacher, in nats per token of trained texts. As written: the checkpoint, whose weights are rounded to the "
        "dtype of the student's files.",
    )


def _point_row(point: CurvePoint, tokens: str) -> ReportRow:
    """Return the row of an evaluation, after so many tokens, in words."""
    values: NewRow = {"tokens": tokens, "divergence": point.loss}
    for label in point.kept:
        values[f"{label}: kept"] = point.kept[label]
        values[f"{label}: perplexity"] = point.perplexity[label]
    return ReportRow(values)
