"""Sections on sparse activations: retention by method and sparsity, and the sparsity of each linear map of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from avss_dist.analysis.sparsity_curves import ENOUGH, Curve, Point
from avss_dist.analysis.verdict import describe_metric, describe_task, metric_format, readable_value
from avss_dist.report.section import GRAY, Chart, Section, interval_ends, page_number
from avss_dist.report.table import BarColumn, ReportColumn, ReportTable, decimals, interval, percent, significant
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.stats.retention import NO_INTERVAL

CAPTION = (
    "Kept: the metric over that of the dense model (of a perplexity: under it), and its 95% interval. Thresholds are "
    "of the text that was counted, and of the dense model unless corrected: so maps differ from the plan."
)
Row = Mapping[str, Any]  # of the table `sparsity`


def sparsity_section(label: str, curves: Sequence[Curve], maps: Sequence[Row] = ()) -> Section:
    """Return the section on a run: retention of each method at each sparsity, and one plan.

    Args:
        maps: the rows of one plan of the table ``sparsity``.
    """
    name = f"sparsity-{page_number(label)}"
    by_task: dict[str, list[tuple[str, Point]]] = {}
    for curve in curves:
        for point in curve.points:
            by_task.setdefault(curve.task, []).append((curve.method, point))
    charts = [_curves_chart(f"{name}-curves-{n}", *task) for n, task in enumerate(by_task.items(), 1)]
    tables = [_curves_table(f"{name}-curves-{n}", *task) for n, task in enumerate(by_task.items(), 1)]
    return Section(
        label=label,
        sentences=[curve.sentence for curve in curves],
        charts=[*charts, *([_map_chart(name, maps)] if maps else [])],
        tables=[*tables, *([_maps_table(name, maps)] if maps else [])],
    )


def _curves_table(name: str, task: str, results: Sequence[tuple[str, Point]]) -> ReportTable:
    points = [point for _, point in results]
    metric = points[0].row["metric"]
    intervals = [point.interval for point in points]
    return ReportTable(
        name=name,
        title=f"Each method at each sparsity, {describe_task(task)}",
        columns=[
            ReportColumn("sparsity by", [method for method, _ in results], number=False),
            ReportColumn("planned", [point.target for point in points], percent(0)),
            ReportColumn("measured", [point.measured for point in points], percent(1), priority=1),
            ReportColumn("maps within 1 point", [point.within for point in points], percent(0), priority=4),
            ReportColumn(
                "farthest map, points",
                [None if point.farthest is None else 100 * point.farthest for point in points],
                decimals(1),
                priority=5,
            ),
            ReportColumn(
                describe_metric(metric),
                [readable_value(metric, point.row["value"]) for point in points],
                metric_format(metric),
            ),
            ReportColumn("kept", [point.retention for point in points], percent(1)),
            ReportColumn("95% interval", intervals, interval(percent(1))),
            BarColumn(values=[point.retention for point in points], largest=1.0, priority=3),
        ],
        caption=CAPTION if all(intervals) else f"{CAPTION} {NO_INTERVAL}",
    )


def _maps_table(name: str, maps: Sequence[Row]) -> ReportTable:
    first = maps[0]
    plan = f"{first['method']}, {first['target']:.0%} of the weights, rule {first['rule']}"
    return ReportTable(
        name=f"{name}-maps",
        title=f"The plan that was made last: {plan}",
        columns=[
            ReportColumn("layer", [row["layer"] for row in maps]),
            ReportColumn("map", [row["map"] for row in maps], number=False),
            ReportColumn("site", [row["site"] for row in maps], number=False),
            ReportColumn("zero by", [row["by"] for row in maps], number=False),
            ReportColumn("value", [row["value"] for row in maps], significant(4)),
            ReportColumn("sparsity", [row["sparsity"] for row in maps], significant(4)),
        ],
    )


def thresholds_table(plan: SparsityPlan) -> ReportTable:
    """Return a table of a plan: threshold or share and expected sparsity by layer and linear map, in shades."""
    maps = list(dict.fromkeys(one.map for one in plan.projections))
    by_place = {(one.layer, one.map): one for one in plan.projections}
    layers = sorted({one.layer for one in plan.projections})
    return ReportTable(
        title=f"What becomes zero in {plan.model}: by {plan.projections[0].by}, and the sparsity that is expected",
        columns=[
            ReportColumn("layer", layers),
            *(
                ReportColumn(
                    name.rpartition(".")[2],
                    [by_place.get((layer, name)) for layer in layers],
                    lambda one: f"{one.value:z.3g} {one.sparsity:4.0%}",
                    style=_shade,
                    priority=number,
                )
                for number, name in enumerate(maps)
            ),
        ],
    )


def _shade(point: Any) -> str:
    if point is None:
        return ""
    shade = round(255 * min(point.sparsity, 1.0))
    return f"rgb({shade},{128},{255 - shade})"


def _curves_chart(name: str, task: str, results: Sequence[tuple[str, Point]]) -> Chart:
    rows = [
        {"method": method, "sparsity": point.target, "kept": point.retention, **interval_ends(point.interval)}
        for method, point in results
    ]
    meaning = "What each method keeps at each sparsity, with its 95% interval."
    return Chart(name=name, title=describe_task(task), meaning=meaning, rows=rows, draw=_curves_drawing)


def _curves_drawing() -> Any:
    """Return the chart of retention by sparsity, with dashed lines at the retentions of critical sparsities."""
    import altair as alt

    x = alt.X("sparsity:Q", title="sparsity", axis=alt.Axis(format="%", grid=False, tickCount=5))
    y = alt.Y("kept:Q", title="retention", axis=alt.Axis(format="%"), scale=alt.Scale(zero=False))
    scale = alt.Scale(scheme="tableau10")
    legend = alt.Legend(orient="bottom", columns=1, symbolOpacity=1)
    base = alt.Chart().encode(x, color=alt.Color("method:N", title=None, scale=scale, legend=legend))
    enough = [alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(y=alt.datum(kept)) for kept in ENOUGH]
    tooltip = ["method:N", alt.Tooltip("sparsity:Q", format=".0%"), alt.Tooltip("kept:Q", format=".1%")]
    return alt.layer(
        *enough,
        base.mark_rule().encode(alt.Y("low:Q"), alt.Y2("high:Q")),
        base.mark_line().encode(y),
        base.mark_point(filled=True, opacity=1).encode(y, tooltip=tooltip),
    ).properties(height=240)


def _map_chart(name: str, maps: Sequence[Row]) -> Chart:
    return Chart(
        name=f"{name}-maps",
        title="Sparsity of the linear maps",
        meaning="The sparsity of each linear map in the plan that was made last.",
        rows=[{"layer": row["layer"], "map": row["map"], "sparsity": row["sparsity"]} for row in maps],
        draw=partial(_map_drawing, list(dict.fromkeys(row["map"] for row in maps))),
    )


def _map_drawing(order: Sequence[str]) -> Any:
    """Return a heat map with a column for each layer and a row for each linear map, from the top."""
    import altair as alt

    legend = alt.Legend(format="%", orient="top", direction="horizontal")
    return (
        alt.Chart()
        .mark_rect()
        .encode(
            alt.X("layer:O", title="layer (from 0)").axis(labelAngle=0, labelOverlap="greedy"),
            alt.Y("map:N", sort=list(order), title=None).axis(labelLimit=alt.ExprRef("room")),
            alt.Color("sparsity:Q", legend=legend),
            tooltip=["layer:Q", "map:N", alt.Tooltip("sparsity:Q", format=".1%")],
        )
        .properties(height=18 * len(order))
    )
