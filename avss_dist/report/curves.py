"""Sections on layer scores along an axis: how ranks move."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from avss_dist.analysis.curves import MIN_TREND, Curve
from avss_dist.report.section import Chart, Section
from avss_dist.report.table import ReportColumn, ReportTable, decimals, percent

MAX_DRAWN = 12  # curves in a picture

AXIS_TITLES = {
    "step": "training step",
    "tokens": "tokens trained on",
    "size": "parameters",
    "sequence_length": "tokens in a row",
}


def curve_section(curve: Curve, name: str) -> Section:
    """Return the section of a curve.

    Args:
        name: base name of its files.
    """
    return Section(
        label=f"{curve.name} along {AXIS_TITLES[curve.along]}",
        sentences=[_sentence(curve)],
        charts=[_chart(curve, name)],
        tables=[_points_table(curve, f"{name}-points"), _layers_table(curve, name)],
    )


def _sentence(curve: Curve) -> str:
    """Return a sentence that says where the lowest layers become those of the last point."""
    lowest = [row.tobytes() for row in curve.is_lowest]
    differing = [index for index, layers in enumerate(lowest) if layers != lowest[-1]]
    first = differing[-1] + 1 if differing else 0
    return f"The lowest 25% are those of the last point from {curve.points[first]} on."


def _points_table(curve: Curve, name: str) -> ReportTable:
    """Return a table with a row for each point."""
    lowest = [", ".join(str(curve.layers[place]) for place in np.flatnonzero(row).tolist()) for row in curve.is_lowest]
    columns = [
        ReportColumn(AXIS_TITLES[curve.along], curve.points),
        ReportColumn("run", [run["run_id"] for run in curve.runs], number=False, priority=5),
        ReportColumn("with the one before", curve.with_previous.tolist(), decimals(3), group="Spearman"),
        ReportColumn("with the last", curve.with_last.tolist(), decimals(3), group="Spearman"),
        ReportColumn("lowest 25%", lowest, number=False, priority=2, wraps=True),
    ]
    return ReportTable(name=name, title="Points", columns=columns)


def _layers_table(curve: Curve, name: str) -> ReportTable:
    """Return a table with a row for each layer: its rank at both ends."""
    ranks, lowest = curve.ranks, curve.is_lowest.mean(axis=0).tolist()
    columns = [
        ReportColumn("layer", curve.layers),
        ReportColumn("depth", curve.depth.tolist(), decimals(2), priority=4),
        ReportColumn("first", ranks[0].tolist(), "{:g}".format, group="rank"),
        ReportColumn("last", ranks[-1].tolist(), "{:g}".format, group="rank"),
        ReportColumn("lowest", ranks.min(axis=0).tolist(), "{:g}".format, group="rank", priority=3),
        ReportColumn("highest", ranks.max(axis=0).tolist(), "{:g}".format, group="rank", priority=3),
    ]
    if len(curve.runs) >= MIN_TREND:
        columns.append(ReportColumn("trend", curve.trend.tolist(), decimals(2), priority=1))
    columns.append(ReportColumn("among the lowest", lowest, percent(0), priority=1))
    return ReportTable(
        name=name,
        title="Layers",
        columns=columns,
        caption="Rank 1 is the lowest score. Trend: Spearman's correlation of the rank with the axis. Among the "
        "lowest: the share of points at which the layer is in the lowest 25%.",
    )


def _chart(curve: Curve, name: str) -> Chart:
    number = len(curve.depth)
    shares = (curve.ranks - 1) / (number - 1)
    labels = _distinct(curve.points)
    rows = [
        {
            "point": label,
            "layer": layer,
            "share": round(float(shares[point, place]), 4),
            "rank": float(curve.ranks[point, place]),
            "run": run["run_id"],
        }
        for point, (label, run) in enumerate(zip(labels, curve.runs, strict=True))
        for place, layer in enumerate(curve.layers)
    ]
    return Chart(
        name=name,
        title=f"Ranks along {AXIS_TITLES[curve.along]}",
        meaning="A column for each point, a cell for each layer; dark layers are the least important.",
        rows=rows,
        draw=partial(_drawing, curve.along, number),
    )


def _distinct(labels: Sequence[str]) -> list[str]:
    """Return labels of points that differ, numbered where two are the same."""
    return [label if labels.count(label) == 1 else f"{label} ({n})" for n, label in enumerate(labels, start=1)]


def curves_chart(curves: Sequence[Curve]) -> Any:
    """Return the heat maps of up to `MAX_DRAWN` curves, one above the other."""
    import altair as alt

    charts = []
    for number, curve in enumerate(curves[:MAX_DRAWN], start=1):
        section = curve_section(curve, f"curve-{number}")
        (chart,) = section.charts
        title = alt.TitleParams(section.label, subtitle=list(section.sentences), anchor="start")
        drawn = chart.draw().properties(width=560, title=title)
        charts.append(drawn.properties(data=alt.InlineData(values=list(chart.rows))))
    return alt.vconcat(*charts).properties(padding=12)


def _drawing(along: str, number: int) -> Any:
    """Return the heat map of ranks by point and layer.

    Args:
        number: number of layers.
    """
    import altair as alt

    legend = alt.Legend(title="rank: 0 least, 1 most important", orient="top", direction="horizontal", titleLimit=240)
    labels = alt.Axis(labelAngle=-45, labelOverlap="greedy", labelLimit=120, grid=False)
    cells = (
        alt.Chart()
        .mark_rect()
        .encode(
            x=alt.X("point:N", sort=None, title=AXIS_TITLES[along], axis=labels),
            y=alt.Y("layer:O", sort="descending", title="layer").axis(labelOverlap="greedy"),
            color=alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=legend),
            tooltip=["point:N", "run:N", "layer:Q", alt.Tooltip("rank:Q", format=".1f")],
        )
    )
    return cells.properties(height=max(120, 11 * number))
