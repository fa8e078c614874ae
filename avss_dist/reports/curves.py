"""Sections on layer scores along an axis: how ranks move."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from avss_dist.analysis.curves import MIN_TREND, Curve
from avss_dist.reports.section import Chart, ReportColumn, ReportTable, Section, decimals, percent
from avss_dist.stats.rankings import spearman_rows

MAX_DRAWN = 12  # curves in a picture

AXIS_TITLES = {
    "step": "training step",
    "tokens": "tokens trained on",
    "size": "parameters",
    "sequence_length": "tokens in a row",
}


def curve_section(curve: Curve, name: str) -> Section:
    """Return the section of a curve: where its lowest layers settle, a heat map, and tables of points and layers.

    Args:
        name: base name of its files.
    """
    axis, points, values = AXIS_TITLES[curve.along], curve.points, curve.values
    is_lowest = curve.is_lowest
    lowest = [", ".join(str(curve.layers[place]) for place in np.flatnonzero(row).tolist()) for row in is_lowest]
    settled = max((index for index, layers in enumerate(lowest) if layers != lowest[-1]), default=-1) + 1
    with_previous = [np.nan, *spearman_rows(values[1:], values[:-1]).tolist()]
    with_last = spearman_rows(values, np.broadcast_to(values[-1], values.shape)).tolist()
    of_points = [
        ReportColumn(axis, points),
        ReportColumn("run", [run["run_id"] for run in curve.runs], number=False, priority=5),
        ReportColumn("with the one before", with_previous, decimals(3), group="Spearman"),
        ReportColumn("with the last", with_last, decimals(3), group="Spearman"),
        ReportColumn("lowest 25%", lowest, number=False, priority=2, wraps=True),
    ]
    ranks, trend = curve.ranks, curve.trend.tolist()
    of_layers = [
        ReportColumn("layer", curve.layers),
        ReportColumn("depth", curve.depth.tolist(), decimals(2), priority=4),
        ReportColumn("first", ranks[0].tolist(), "{:g}".format, group="rank"),
        ReportColumn("last", ranks[-1].tolist(), "{:g}".format, group="rank"),
        ReportColumn("lowest", ranks.min(axis=0).tolist(), "{:g}".format, group="rank", priority=3),
        ReportColumn("highest", ranks.max(axis=0).tolist(), "{:g}".format, group="rank", priority=3),
        *([ReportColumn("trend", trend, decimals(2), priority=1)] if len(curve.runs) >= MIN_TREND else []),
        ReportColumn("among the lowest", is_lowest.mean(axis=0).tolist(), percent(0), priority=1),
    ]
    caption = "Rank 1 is the lowest score. Trend: Spearman's correlation of the rank with the axis. Among the "
    caption += "lowest: the share of points at which the layer is in the lowest 25%."
    number = len(curve.depth)
    distinct = [text if points.count(text) == 1 else f"{text} ({n})" for n, text in enumerate(points, start=1)]
    cells = [
        {
            "point": label,
            "layer": layer,
            "run": run["run_id"],
            "rank": float(rank),
            "share": round(float((rank - 1) / (number - 1)), 4),
        }
        for label, run, of_point in zip(distinct, curve.runs, ranks, strict=True)
        for layer, rank in zip(curve.layers, of_point, strict=True)
    ]
    chart = Chart(
        name=name,
        title=f"Ranks along {axis}",
        meaning="A column for each point, a cell for each layer; dark layers are the least important.",
        rows=cells,
        draw=partial(_drawing, curve.along, number),
    )
    return Section(
        label=f"{curve.name} along {axis}",
        sentences=[f"The lowest 25% are those of the last point from {points[settled]} on."],
        charts=[chart],
        tables=[
            ReportTable(name=f"{name}-points", title="Points", columns=of_points),
            ReportTable(name=name, title="Layers", columns=of_layers, caption=caption),
        ],
    )


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
    cells = alt.Chart().mark_rect()
    return cells.properties(height=max(120, 11 * number)).encode(
        x=alt.X("point:N", sort=None, title=AXIS_TITLES[along], axis=labels),
        y=alt.Y("layer:O", sort="descending", title="layer").axis(labelOverlap="greedy"),
        color=alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=legend),
        tooltip=["point:N", "run:N", "layer:Q", alt.Tooltip("rank:Q", format=".1f")],
    )
