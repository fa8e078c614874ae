"""Sections on experiments: retention without the layers that each method chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from avss_dist.analysis.verdict import (
    CLAIMED_KEPT,
    WHOLE,
    describe_metric,
    describe_task,
    kept_by_guess,
    lacks_interval,
    metric_format,
    primary_metric,
    readable_value,
    retention_interval,
    shown_method,
    verdicts,
)
from avss_dist.core.intervention import decode_removals, describe_removed
from avss_dist.core.names import PERPLEXITY
from avss_dist.core.text import basename
from avss_dist.reports.section import (
    BLUE,
    GRAY,
    Chart,
    ReportColumn,
    ReportTable,
    Row,
    Section,
    interval,
    page_number,
    percent,
)
from avss_dist.stats.metrics import NO_INTERVAL

LARGEST_SHOWN = 1.5  # retention that the chart has room for


def experiment_sections(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> list[Section]:
    """Return the results on dropped layers of each run that dropped any.

    Args:
        rows: rows of the table ``experiments``, the newest last. The last of repeated evaluations counts.
        labels: labels of runs by id, in their order; by default the model and the id.
    """
    by_run: dict[str, list[Row]] = {run_id: [] for run_id in labels or ()}
    for row in rows:
        by_run.setdefault(row["run_id"], []).append(row)
    sections = []
    for run_id, of_run in by_run.items():
        newest: dict[tuple[Any, ...], Row] = {}
        for row in of_run:
            if row["score"] is None or (row["share"] and not row.get("factor")):  # not sparsities, of version 0.2
                newest[shown_method(row), row["share"], row["task"], row["metric"]] = row
        if any(row["share"] for row in newest.values()):
            label = labels[run_id] if labels else f"{of_run[0]['model']}  ({run_id})"
            sections.append(_section(label, list(newest.values())))
    return sections


def _section(label: str, rows: Sequence[Row]) -> Section:
    """Return the section on the results of one run, each of which is there once."""
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    metrics = {task: primary_metric(of_task) for task, of_task in by_task.items()}
    primary = sorted(
        (row for row in rows if row["metric"] == metrics[row["task"]]), key=lambda row: float(row["share"])
    )
    methods: dict[tuple[float, str], dict[str, Row]] = {}
    for row in primary:
        methods.setdefault((row["share"], shown_method(row)), {})[row["task"]] = row
    dropped = [
        describe_removed(decode_removals(next(iter(of_method.values()))["drop"])) for of_method in methods.values()
    ]
    columns = [
        ReportColumn("layers chosen by", [method for _, method in methods], number=False),
        ReportColumn("share", [share for share, _ in methods], percent(0)),
        ReportColumn("dropped", [text or None for text in dropped], number=False, wraps=True, priority=3),
    ]
    name = f"experiment-{page_number(label)}"
    charts: list[Chart] = []
    for task, metric in metrics.items():
        group, results = (
            basename(task.removeprefix(PERPLEXITY)),
            [of_method.get(task) for of_method in methods.values()],
        )
        compared = [row if row and row["score"] is not None else None for row in results]
        values, format_ = [row and readable_value(metric, row["value"]) for row in results], metric_format(metric)
        columns += [
            ReportColumn(describe_metric(metric), values, format_, group=group, priority=2),
            ReportColumn("kept", [row and row["retention"] for row in compared], percent(1), group=group),
            ReportColumn(
                "95% interval",
                [row and retention_interval(row) for row in compared],
                interval(percent(1)),
                group=group,
                priority=1,
            ),
        ]
    for share in dict.fromkeys(share for share, method in methods if method != WHOLE):
        for task, metric in metrics.items():
            guess = kept_by_guess(by_task[task], metric)
            drawn = [
                {
                    "method": method,
                    "kept": min(result["retention"], LARGEST_SHOWN),
                    "guess": guess,
                    **dict(zip(("low", "high"), retention_interval(result) or (None, None), strict=True)),
                }
                for (at, method), of_method in methods.items()
                if at == share and method != WHOLE and (result := of_method.get(task))
            ]
            if drawn:
                chart = Chart(
                    name=f"{name}-{len(charts) + 1}",
                    title=f"{describe_task(task)}, {share:.0%} dropped",
                    meaning="What each method keeps, with its 95% interval.",
                    rows=drawn,
                    draw=partial(_drawing, max([1.1, *(row["kept"] for row in drawn)]), len(drawn)),
                )
                charts.append(chart)
    caption = "Kept: the metric over that of the whole model (of a perplexity: under it), and its 95% interval."
    return Section(
        label=label,
        sentences=verdicts([{**row, "task": describe_task(row["task"])} for row in rows])
        or ["No share of 25% by AVSS was tried."],
        charts=charts,
        tables=[
            ReportTable(
                name=name,
                title="Each method at each share",
                columns=columns,
                caption=f"{caption} {NO_INTERVAL}" if lacks_interval(primary) else caption,
            )
        ],
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
