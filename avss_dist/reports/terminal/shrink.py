"""Tables and lines on a shrunk or distilled model: retention against the whole model, by task, tokens and layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType

from avss_dist.analysis.section import (
    BarColumn,
    ReportColumn,
    ReportTable,
    interval,
    known_interval,
)
from avss_dist.core.intervention import count_removed, describe_removed
from avss_dist.core.registry import PERPLEXITY
from avss_dist.core.text import basename, describe_bytes
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.stats.metrics import NO_INTERVAL
from avss_dist.warehouse.reader import grouped

if TYPE_CHECKING:
    from avss_dist.distillation.distill import Distilled
    from avss_dist.evaluation.continuations import Continuation
    from avss_dist.evaluation.shrink import Shrunk, TaskRetention


def shrunk_tables(done: Shrunk) -> RenderableType:
    """Return tables of the metrics of the models, of the curve of several plans, and of continuations."""
    plan = done.best.plan
    rows = [
        "whole model",
        f"{count_removed(plan.drop)} dropped",
        *([f"repaired by {done.record.repair}"] if done.record else []),
        *([f"distilled on {done.distillation.after.tokens:,} tokens"] if done.distillation else []),
    ]
    complete = all(retention.has_interval for task in done.best.tasks for retention in task.retentions.values())
    tables = [
        ReportTable(
            columns=[
                ReportColumn("", rows, number=False),
                *(column for task in done.best.tasks for column in _task_columns(task)),
            ],
            title=f"{basename(plan.model)} without {len(plan.drop)} of its {plan.num_layers} layers",
            caption="Kept: of the whole model's metric (of a perplexity: whole over this), and its 95% interval."
            + ("" if complete else f" {NO_INTERVAL}"),
        )
    ]
    if len(done.curve) > 1:
        dropped, retentions = [len(point.plan.drop) for point in done.curve], [point.kept for point in done.curve]
        when = " before distillation" if done.distillation else ""
        tables.append(
            ReportTable(
                columns=[
                    ReportColumn("layers dropped", dropped),
                    ReportColumn("share", [number / plan.num_layers for number in dropped], "{:z.0%}".format),
                    ReportColumn("kept", retentions, "{:z.1%}".format),
                    BarColumn(values=retentions, largest=1.0, width=40),
                ],
                title=f"What is kept{when}, in the task in which the least is",
            )
        )
    return Group(*map(FittedTable, [*tables, *continuation_tables(done.continuations)]))


def continuation_tables(continuations: Sequence[Continuation]) -> Iterator[ReportTable]:
    """Yield a table for each prompt, with a row for each model."""
    for prompt, same in grouped(continuations, itemgetter("prompt")).items():
        texts = [" ".join(continuation["text"].split()) for continuation in same]
        yield ReportTable(
            title=f"Greedy continuation of: {' '.join(prompt.split())}",
            columns=[
                ReportColumn("model", [continuation["model"] for continuation in same], number=False, wraps=True),
                ReportColumn("continuation", texts, number=False, wraps=True),
            ],
        )


def _task_columns(task: TaskRetention) -> Iterator[ReportColumn]:
    retentions = [None, *task.retentions.values()]
    metrics = [result.metrics()[-1] for result in task.results.values()]
    yield ReportColumn(
        metrics[0][0],
        [f"{value:z,.4g}" for _, value, _ in metrics],
        group=basename(task.task.removeprefix(PERPLEXITY)),
    )
    yield ReportColumn(
        "kept", [retention and retention.value for retention in retentions], "{:z.1%}".format, missing=""
    )
    intervals = [retention and known_interval(retention.low, retention.high) for retention in retentions]
    yield ReportColumn("95% interval", intervals, interval("{:z.1%}".format), priority=1)


def shrunk_values(done: Shrunk) -> dict[str, Any]:
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
        finals = [(task.task, task.final) for task in done.best.tasks]
        values["distilled"] = [{"task": k, "kept": v.value, "low": v.low, "high": v.high} for k, v in finals]
    return values


def shrunk_lines(done: Shrunk) -> Iterator[str]:
    """Yield lines on the written checkpoint: size, dropped layers, findings, repair, and notes."""
    plan = done.best.plan
    yield f"{done.folder}: {len(plan.keep)} of {plan.num_layers} layers, {describe_bytes(done.bytes)} of weights."
    yield f"Dropped {describe_removed(plan.drop)}, chosen by {plan.why['by']}."
    yield from (f"Finding: {line}" for line in plan.findings)
    yield from done.record.describe() if done.record else ()
    yield from done.distillation.describe() if done.distillation else ()
    yield from done.notes


def distilled_table(done: Distilled) -> ReportTable:
    """Return a table with a row for each evaluation: loss, and what is kept of each text."""
    record = done.record
    tokens_before = [point.tokens for point in record.curve[:-1]]
    written = f"{record.after.tokens:,}, as written"
    columns = [
        ReportColumn("tokens", [f"{tokens:,}" for tokens in tokens_before] + [written], number=False),
        ReportColumn("divergence", [point.loss for point in record.curve], "{:z.3g}".format),
    ]
    for text in record.texts:
        group = text.label if text.trained_rows else f"{text.label}, watched"
        columns += [
            ReportColumn("kept", [p.kept[text.label] for p in record.curve], "{:z.1%}".format, group=group),
            ReportColumn(
                "perplexity",
                [p.perplexity[text.label] for p in record.curve],
                "{:z.4g}".format,
                group=group,
                priority=1,
            ),
        ]
    return ReportTable(
        columns=columns,
        title=f"{record.student}, distilled from {record.teacher}",
        caption="On rows that are not trained on; kept: the teacher's perplexity over the student's; divergence: from "
        "the teacher, in nats per token of trained texts. As written: the checkpoint, whose weights are rounded to the "
        "dtype of the student's files.",
    )
