"""Sections on experiments: retention without the layers that each method chose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from avss_dist.analysis.experiments import ExperimentResults, TaskMetric, experiment_results
from avss_dist.analysis.verdict import CLAIMED_KEPT, describe_metric, describe_task, metric_format, readable_value
from avss_dist.core.intervention import describe_removed
from avss_dist.core.names import PERPLEXITY
from avss_dist.core.text import basename
from avss_dist.report.section import BLUE, GRAY, Chart, Section, interval_ends, page_number
from avss_dist.report.table import ReportColumn, ReportTable, interval, percent
from avss_dist.stats.retention import NO_INTERVAL

LARGEST_SHOWN = 1.5  # retention that the chart has room for
Row = Mapping[str, Any]  # of the table `experiments`


def experiment_sections(rows: Sequence[Row]) -> list[Section]:
    """Return the results of each run.

    Args:
        rows: rows of the table ``experiments``, the newest last.
    """
    sections = []
    for run_id in dict.fromkeys(row["run_id"] for row in rows):
        of_run = [row for row in rows if row["run_id"] == run_id]
        label = f"{of_run[0]['model']}  ({run_id})"
        if results := experiment_results(of_run):
            sections.append(experiment_section(label, results))
    return sections


def experiment_section(label: str, results: ExperimentResults) -> Section:
    """Return the results on dropped layers of one run."""
    name = f"experiment-{page_number(label)}"
    return Section(
        label=label,
        sentences=[*(results.verdicts or ["No share of 25% by AVSS was tried."])],
        charts=list(_charts(name, results)),
        tables=[_table(name, results)],
    )


def _table(name: str, results: ExperimentResults) -> ReportTable:
    methods = results.methods
    caption = "Kept: the metric over that of the whole model (of a perplexity: under it), and its 95% interval."
    return ReportTable(
        name=name,
        title="Each method at each share",
        columns=[
            ReportColumn("layers chosen by", [one.method for one in methods], number=False),
            ReportColumn("share", [one.share for one in methods], percent(0)),
            ReportColumn(
                "dropped", [describe_removed(one.drop) or None for one in methods], number=False, wraps=True, priority=3
            ),
            *(column for task in results.tasks for column in _task_columns(task, results)),
        ],
        caption=f"{caption} {NO_INTERVAL}" if results.lacks_interval else caption,
    )


def _task_columns(task: TaskMetric, results: ExperimentResults) -> Iterator[ReportColumn]:
    group = basename(task.name.removeprefix(PERPLEXITY))
    outcomes = [(one.is_whole, one.outcomes.get(task.name)) for one in results.methods]
    compared = [None if is_whole else outcome for is_whole, outcome in outcomes]
    yield ReportColumn(
        describe_metric(task.metric),
        [outcome and readable_value(task.metric, outcome.value) for _, outcome in outcomes],
        metric_format(task.metric),
        group=group,
        priority=2,
    )
    retention = [outcome and outcome.retention for outcome in compared]
    yield ReportColumn("kept", retention, percent(1), group=group)
    intervals = [outcome and outcome.interval for outcome in compared]
    yield ReportColumn("95% interval", intervals, interval(percent(1)), group=group, priority=1)


def _charts(name: str, results: ExperimentResults) -> Iterator[Chart]:
    """Yield a chart for each task and share: a dot for each method with its interval."""
    number = 0
    for share in dict.fromkeys(result.share for result in results.methods if not result.is_whole):
        for task in results.tasks:
            rows: list[dict[str, Any]] = [
                {
                    "method": result.method,
                    "kept": min(outcome.retention, LARGEST_SHOWN),
                    "guess": task.guess,
                    **interval_ends(outcome.interval),
                }
                for result in results.methods
                if result.share == share and not result.is_whole and (outcome := result.outcomes.get(task.name))
            ]
            if rows:
                number += 1
                yield Chart(
                    name=f"{name}-{number}",
                    title=f"{describe_task(task.name)}, {share:.0%} dropped",
                    meaning="What each method keeps, with its 95% interval.",
                    rows=rows,
                    draw=partial(_drawing, max([1.1, *(row["kept"] for row in rows)]), len(rows)),
                )


def _drawing(largest: float, number: int) -> Any:
    """Return the chart of retention by method, with lines at the claim of the paper (dashed) and a guess (dotted)."""
    import altair as alt

    base = alt.Chart().encode(alt.Y("method:N", sort=None, title=None).axis(labelLimit=alt.ExprRef("room")))
    scale = alt.Scale(domain=[0, largest], clamp=True)
    retention = alt.X("kept:Q", scale=scale, title="retention", axis=alt.Axis(format="%", grid=False, tickCount=5))
    tooltip = ["method:N", alt.Tooltip("kept:Q", format=".1%")]
    return alt.layer(
        alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(x=alt.datum(CLAIMED_KEPT)),
        alt.Chart().mark_rule(color=GRAY, strokeDash=[1, 3]).encode(alt.X("guess:Q", aggregate="max")),
        base.mark_rule(color=BLUE, clip=True).encode(alt.X("low:Q"), alt.X2("high:Q")),
        base.mark_point(filled=True, color=BLUE, size=45, opacity=1).encode(retention, tooltip=tooltip),
    ).properties(height=17 * number)
