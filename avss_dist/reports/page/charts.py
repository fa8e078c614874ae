"""The charts of the report's page, as Vega-Lite specifications.

The page gives them rows, texts and colors.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import altair as alt

from avss_dist.analysis.section import GRAY, Chart
from avss_dist.reports.chart import LOWEST_COLOR, ROWS, depth_chart, layer_axis
from avss_dist.stats.catalog import FROM_ACTIVATIONS, SCORES

if TYPE_CHECKING:
    from altair.typing import ChartType

ChartSpec = dict[str, object]
"""Specification of a chart in Vega-Lite's JSON, by key."""

HEIGHTS = {"avss": 280, "blocks": 340, "kept": 280, "lowest": 280}
OTHER_HEIGHT = 170  # pixels, of the charts of the other scores
AXES = (("layer", "log"), ("layer", "linear"), ("depth", "log"), ("depth", "linear"))
"""Axes of the charts by depth: the layer or the relative depth, and the scale of the score."""
STRONG = 0.6  # a cell of such a correlation is dark enough for light numbers
ROOM = alt.param(name="room", value=180)  # for the labels of runs, in pixels
OF_RUNS = (
    alt.param(name="names", value=["", ""]),
    alt.param(name="which", value=[0]),
)
"""Parameters of charts: labels of the chosen and the compared run, and the positions of those that are present."""
_RUNS = alt.Y("run:N", title=None, sort=None).axis(labelLimit=alt.ExprRef("room"), ticks=False, domain=False)
"""Axis of runs by label, in the order of the rows."""
_DEPTHS = alt.X("from:Q", title="relative depth", scale=alt.Scale(domain=[0, 1])).axis(tickCount=5, grid=False)


@cache
def page_charts() -> dict[str, ChartSpec]:
    """Return the specification of every chart by name. Names of charts by depth include their axes: ``avss:layer:log``.

    Those of AVSS with intervals are ``avss:layer:log:interval`` and so on.

    Each draws the data set ``rows``, and writes the signal ``choice`` above it, cut to ``limit`` pixels.
    """
    charts: dict[str, ChartType] = {}
    for name in FROM_ACTIVATIONS:
        for axis, scale in AXES:
            charts[f"{name}:{axis}:{scale}"] = _by_depth(name, axis, scale)
    for axis, scale in AXES:
        charts[f"avss:{axis}:{scale}:interval"] = _by_depth("avss", axis, scale, interval=True)
    charts["heat"] = _heat()
    charts["lowest"] = _lowest()
    charts["correlation"] = _correlation()
    charts["blocks"] = _blocks()
    charts["kept"] = _best_sets()
    return {name: _finished(chart) for name, chart in charts.items()}


def section_chart(chart: Chart) -> ChartSpec:
    """Return the specification of the chart of a section, which draws the data set ``rows``."""
    return _finished(chart.draw().properties(data=ROWS).add_params(ROOM))


def _finished(chart: ChartType) -> ChartSpec:
    """Return the specification of a chart as wide as its container, titled by the signal ``choice``, without colors."""
    title = alt.TitleParams(text=alt.ExprRef("choice"), limit=alt.ExprRef("limit"), anchor="start", frame="bounds")
    chart = chart.add_params(alt.param(name="choice", value=""), alt.param(name="limit", value=600)).properties(
        title=title,
        width="container",
        autosize=alt.AutoSizeParams(type="fit-x", contains="padding"),
    )
    # Validation takes as long as the rest. Tests validate.
    spec: ChartSpec = chart.to_dict(validate=False)
    # The page has its own configuration, which follows its colors.
    del spec["config"]
    return spec


def _by_depth(name: str, axis: str, scale: str, *, interval: bool = False) -> ChartType:
    """Return the chart of a score by depth: a line, or also an interval, for each run, triangles for its lowest 25%."""
    legend = alt.Legend(
        orient="top",
        columns=1,
        title=None,
        labelLimit=alt.ExprRef("limit"),
        labelExpr="names[datum.value]",  # of the chosen and the compared run
        symbolOpacity=1,
        symbolType="circle",
        values=alt.ExprRef("which"),
    )
    if axis == "depth":
        x = alt.X("depth:Q", title="relative depth").scale(domain=[0, 1])
    else:
        x = layer_axis()
    tooltip = [
        alt.Tooltip("run:N"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("layer_name:N", title="name"),
        alt.Tooltip(f"{name}:Q", title=SCORES[name].title, format=".4g"),
        alt.Tooltip("rank:Q"),
    ]
    chart = depth_chart(
        alt.Chart().encode(x=x),
        name,
        SCORES[name].title,
        alt.Color("which:N", scale=alt.Scale(domain=[0, 1], range="category"), legend=legend),
        log=scale == "log",
        linear=alt.Scale(zero=False),
        lowest="lowest",
        ends=("low", "high") if interval else None,
        tooltip=tooltip,
    )
    return chart.properties(data=ROWS, height=HEIGHTS.get(name, OTHER_HEIGHT)).add_params(*OF_RUNS)


def _blocks() -> ChartType:
    """Return a heat map of blocks of layers by first layer and length. The nearest block of each length is marked."""
    plain: dict[str, Any] = {"ticks": False, "domain": False, "labelSeparation": 4}
    first_layer = alt.X("start:O", title="first layer (from 0)")
    length = alt.Y("length:O", title="layers", sort="descending")
    tooltip = [
        alt.Tooltip("start:Q", title="first layer"),
        alt.Tooltip("length:Q", title="layers"),
        alt.Tooltip("distance:Q", format=".4f"),
    ]
    base = alt.Chart().encode(
        x=first_layer.axis(labelAngle=0, labelOverlap="greedy", **plain),
        y=length.axis(labelOverlap="greedy", **plain),
        tooltip=tooltip,
    )
    legend = alt.Legend(title="distance: 0 none, 1 opposite", orient="top", direction="horizontal", titleLimit=240)
    cells = base.mark_rect().encode(
        color=alt.Color("distance:Q", scale=alt.Scale(scheme="viridis"), legend=legend),
    )
    nearest = base.mark_point(filled=True, color=LOWEST_COLOR, stroke="white", size=24, opacity=1)
    nearest = nearest.transform_filter("datum.nearest")
    return alt.layer(cells, nearest, data=ROWS).properties(height=HEIGHTS["blocks"])


def _best_sets() -> ChartType:
    """Return a chart of the best set of each size, with a line for each task and repair."""
    share = alt.X("share:Q", title="share of the layers that is left out").scale(zero=True)
    kept = alt.Y("kept:Q", title="kept", scale=alt.Scale(zero=True))
    legend = alt.Legend(
        orient="top",
        columns=1,
        title=None,
        labelLimit=alt.ExprRef("limit"),
        symbolOpacity=1,
        symbolType="circle",
    )
    base = alt.Chart().encode(
        x=share.axis(format="%", tickCount=6),
        y=kept.axis(format="%"),
        color=alt.Color("series:N", sort=None, legend=legend, scale=alt.Scale(scheme="tableau10")),
    )
    tooltip = [
        alt.Tooltip("series:N", title="task"),
        alt.Tooltip("dropped:N", title="without"),
        alt.Tooltip("share:Q", format=".1%"),
        alt.Tooltip("kept:Q", format=".1%"),
    ]
    points = base.mark_point(filled=True, size=45, opacity=1)
    points = points.encode(shape=alt.Shape("series:N", sort=None, legend=None), tooltip=tooltip)
    return alt.layer(base.mark_line(strokeWidth=1.5), points, data=ROWS).properties(height=HEIGHTS["kept"])


def _heat() -> ChartType:
    """Return a heat map: a row for each run, a cell for each layer, colored by its place in the ranking."""
    legend = alt.Legend(title="rank: 0 least, 1 most important", orient="top", direction="horizontal", titleLimit=240)
    chart = alt.Chart(ROWS).mark_rect()
    chart = chart.encode(
        x=_DEPTHS,
        x2="to:Q",
        y=_RUNS,
        color=alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=legend),
        tooltip=["run:N", "layer:Q", "rank:Q", alt.Tooltip("value:Q", title="score", format=".4g")],
    )
    return chart.add_params(ROOM)


def _lowest() -> ChartType:
    """Return a bar chart of the share of runs with a place among their lowest 25%, with a dashed line at chance."""
    share = alt.Y("share:Q", title="of the runs", scale=alt.Scale(domain=[0, 1]))
    bars = alt.Chart().mark_rect(color=LOWEST_COLOR, opacity=0.8)
    bars = bars.encode(
        x=_DEPTHS,
        x2="to:Q",
        y=share.axis(format="%", tickCount=5),
        y2=alt.datum(0),
        tooltip=[alt.Tooltip("place:N"), alt.Tooltip("share:Q", title="of the runs", format=".0%")],
    )
    chance = alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(alt.Y("chance:Q", aggregate="max"))
    return alt.layer(bars, chance, data=ROWS).properties(height=HEIGHTS["lowest"])


def _correlation() -> ChartType:
    """Return a heat map of the correlation of pairs of runs, with numbers where there is room."""
    number = alt.X("column:N", title="number of the run", sort=None)
    base = alt.Chart().encode(
        x=number.axis(labelAngle=0, ticks=False, domain=False, labelOverlap="greedy"),
        y=_RUNS,
    )
    scale = alt.Scale(domain=[-1, 0, 1], range="diverging", type="linear", interpolate="lab")
    legend = alt.Legend(title="rank correlation", orient="top", direction="horizontal")
    tooltip = [
        alt.Tooltip("run:N"),
        alt.Tooltip("other:N", title="with"),
        alt.Tooltip("kind:N", title="is"),
        alt.Tooltip("correlation:Q", format=".3f"),
    ]
    cells = base.mark_rect().encode(
        color=alt.Color("correlation:Q", scale=scale, legend=legend),
        tooltip=tooltip,
    )
    texts = base.encode(text=alt.Text("correlation:Q", format=".2f"))
    is_written = "datum.written && isValid(datum.correlation)"
    weak = texts.mark_text(style="weak", fontSize=10)
    weak = weak.transform_filter(f"{is_written} && abs(datum.correlation) < {STRONG}")
    strong = texts.mark_text(style="strong", fontSize=10)
    strong = strong.transform_filter(f"{is_written} && abs(datum.correlation) >= {STRONG}")
    return alt.layer(cells, weak, strong, data=ROWS).add_params(ROOM)
