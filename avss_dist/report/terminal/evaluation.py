"""Evaluations of whole and pruned models as a table."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.core.intervention import count_removed
from avss_dist.core.text import printable
from avss_dist.report.section import Interval, ReportColumn, ReportTable, known_interval, percent, significant
from avss_dist.report.terminal.tables import FittedTable
from avss_dist.stats.metrics import NO_INTERVAL

if TYPE_CHECKING:
    from avss_dist.evaluation.evaluate import Evaluations


def evaluation_table(evaluations: Evaluations) -> RenderableType:
    """Return a table with a row for each subject and task, and the findings below. Losses are shown as perplexities."""
    caption = (
        "Retention: the metric without the layers over that with them (of a perplexity: with over without), "
        "and its 95% interval over the same samples."
    )
    if not all(one.retained.has_interval for one in evaluations if one.retained):
        caption = f"{caption} {NO_INTERVAL}"
    metrics = [one.result.metrics()[-1] for one in evaluations]
    table = ReportTable(
        columns=[
            ReportColumn("", [one.subject.label for one in evaluations], number=False, wraps=True),
            ReportColumn(
                "dropped",
                [
                    count_removed(removed) if (removed := one.subject.intervention.removed) else None
                    for one in evaluations
                ],
                number=False,
                priority=3,
            ),
            ReportColumn("task", [one.task for one in evaluations], number=False, wraps=True),
            ReportColumn("metric", [metric for metric, *_ in metrics], number=False),
            ReportColumn("value", [value for _, value, _ in metrics], significant(4)),
            ReportColumn("+/-", [_finite(error) for *_, error in metrics], significant(2), priority=4),
            *_compared_columns(evaluations),
        ],
        caption=caption,
    )
    return Group(FittedTable(table), *(Text(printable(line)) for line in evaluations.findings))


def _compared_columns(evaluations: Evaluations) -> Iterator[ReportColumn]:
    """Yield the columns that compare with the whole model."""
    whole = [one.whole.metrics()[-1][1] if one.whole else None for one in evaluations]
    retained = [one.retained for one in evaluations]
    intervals = [retention and known_interval(retention.low, retention.high) for retention in retained]
    yield ReportColumn("whole model", whole, significant(4), priority=2)
    yield ReportColumn("retention", [retention and retention.value for retention in retained], percent(1))
    yield ReportColumn("95% interval", intervals, _interval, priority=1)


def _finite(value: float) -> float | None:
    return value if isfinite(value) else None


def _interval(ends: Interval) -> str:
    return "{:z.1%} .. {:z.1%}".format(*ends)
