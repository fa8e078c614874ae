"""The charts of the report's page, as Vega-Lite specifications; the page gives them rows, texts and colors."""

from __future__ import annotations

from functools import cache
from typing import Any

import altair as alt

from avss_dist.registry import FROM_ACTIVATIONS, SCORES
from avss_dist.report.chart import LOWEST_COLOR
from avss_dist.report.page.charts_across import GRAY, OF_RUNS, ROWS, charts_across, color_of_runs

TITLE = alt.TitleParams(text=alt.ExprRef("choice"), limit=alt.ExprRef("limit"), anchor="start", frame="bounds")
HEIGHTS = {"avss": 280, "scatter": 340, "blocks": 340, "kept": 280}
RIVAL_HEIGHT = 170


@cache
def page_charts() -> dict[str, dict[str, Any]]:
    """Specifications by name. Those of scores by depth name their axes too: ``avss:layer:log``.

    Each draws the data set ``rows``, and writes the signal ``choice`` above it, cut to ``limit`` pixels.
    """
    charts: dict[str, Any] = {
        f"{name}:{axis}:{scale}": _by_depth(name, SCORES[name].title, axis, scale)
        for name in FROM_ACTIVATIONS
        for axis in ("layer", "depth")
        for scale in ("log", "linear")
    }
    charts |= {**charts_across(), "scatter": _scatter()}
    charts |= {"blocks": _blocks(), "kept": _kept()}
    return {name: _finished(chart) for name, chart in charts.items()}


def _finished(chart: Any) -> dict[str, Any]:
    chart = chart.add_params(alt.param(name="choice", value=""), alt.param(name="limit", value=600))
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    chart = chart.properties(title=TITLE, width="container", autosize=fit)
    spec: dict[str, Any] = chart.to_dict()
    del spec["config"]  # the page's, which follows its colors
    return spec


def _by_depth(name: str, title: str, axis: str, scale: str) -> Any:
    """A line for each run, its interval if it has one, and triangles for the lowest 25% of its layers."""
    x = alt.X(f"{axis}:Q", title="layer (from 0)").axis(format="d", tickMinStep=1).scale(nice=False)
    if axis == "depth":
        x = alt.X("depth:Q", title="relative depth").scale(domain=[0, 1])
    y_scale: Any = alt.Scale(type="log") if scale == "log" else alt.Scale(zero=False)
    y_title = f"{title} (log)" if scale == "log" else title
    color = color_of_runs()
    lines = alt.Chart().encode(x=x, y=alt.Y(f"{name}:Q", title=y_title, scale=y_scale), color=color)
    lowest = alt.when("datum.lowest")
    points = lines.encode(
        color=lowest.then(alt.value(LOWEST_COLOR)).otherwise(color),
        shape=lowest.then(alt.value("triangle-down")).otherwise(alt.value("circle")),
        size=lowest.then(alt.value(90)).otherwise(alt.value(34)),
        tooltip=_tooltip(name, title),
    )
    layers = [lines.mark_line(strokeWidth=1.5), points.mark_point(filled=True, opacity=1)]
    if name == "avss":
        interval = lines.mark_area(opacity=0.2).encode(alt.Y("low:Q", title=y_title, scale=y_scale), alt.Y2("high:Q"))
        layers.insert(0, interval)
    return alt.layer(*layers, data=ROWS).add_params(*OF_RUNS).properties(height=HEIGHTS.get(name, RIVAL_HEIGHT))


def _tooltip(name: str, title: str) -> list[Any]:
    return [
        alt.Tooltip("run:N"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("layer_name:N", title="name"),
        alt.Tooltip(f"{name}:Q", title=title, format=".4g"),
        alt.Tooltip("rank:Q"),
    ]


def _scatter() -> Any:
    """Every layer of every run, those of the run that is shown larger and colored by depth."""
    legend = alt.Legend(title="relative depth", orient="top", direction="horizontal")
    depth = alt.Color("depth:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=legend)
    return (
        alt.Chart(ROWS)
        .mark_point(filled=True)
        .encode(
            x=alt.X("sparsity:Q", title="sparsity (log)", scale=alt.Scale(type="log")).axis(format="~e"),
            y=alt.Y("variance:Q", title="variance (log)", scale=alt.Scale(type="log")).axis(format="~g"),
            color=alt.when("datum.shown").then(depth).otherwise(alt.value(GRAY)),
            size=alt.when("datum.shown").then(alt.value(70)).otherwise(alt.value(22)),
            opacity=alt.when("datum.shown").then(alt.value(1)).otherwise(alt.value(0.4)),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("layer:Q"),
                alt.Tooltip("sparsity:Q", format=".4g"),
                alt.Tooltip("variance:Q", format=".4g"),
                alt.Tooltip("rank:Q", title="AVSS rank"),
            ],
        )
        .properties(height=HEIGHTS["scatter"])
    )


def _blocks() -> Any:
    """A cell for each run of neighbours: where it begins, and how long it is; of each length the nearest is marked."""
    legend = alt.Legend(title="distance: 0 none, 1 opposite", orient="top", direction="horizontal", titleLimit=240)
    plain: dict[str, Any] = {"ticks": False, "domain": False, "labelSeparation": 4}
    x = alt.X("start:O", title="first layer (from 0)").axis(labelAngle=0, labelOverlap="greedy", **plain)
    y = alt.Y("length:O", title="layers", sort="descending").axis(labelOverlap="greedy", **plain)
    tooltip = [
        alt.Tooltip("start:Q", title="first layer"),
        alt.Tooltip("length:Q", title="layers"),
        alt.Tooltip("distance:Q", format=".4f"),
    ]
    base = alt.Chart().encode(x=x, y=y, tooltip=tooltip)
    cells = base.mark_rect().encode(color=alt.Color("distance:Q", scale=alt.Scale(scheme="viridis"), legend=legend))
    nearest = base.mark_point(filled=True, color=LOWEST_COLOR, stroke="white", size=24, opacity=1).transform_filter(
        "datum.nearest"
    )
    return alt.layer(cells, nearest, data=ROWS).properties(height=HEIGHTS["blocks"])


def _kept() -> Any:
    """A line for each task and repair: the best set of each size."""
    legend = alt.Legend(
        orient="top", columns=1, title=None, labelLimit=alt.ExprRef("limit"), symbolOpacity=1, symbolType="circle"
    )
    base = alt.Chart().encode(
        x=alt.X("share:Q", title="share of the layers that is left out").scale(zero=True).axis(format="%", tickCount=6),
        y=alt.Y("kept:Q", title="kept", scale=alt.Scale(zero=True)).axis(format="%"),
        color=alt.Color("series:N", sort=None, legend=legend, scale=alt.Scale(scheme="tableau10")),
    )
    points = base.mark_point(filled=True, size=45, opacity=1).encode(
        shape=alt.Shape("series:N", sort=None, legend=None),
        tooltip=[
            alt.Tooltip("series:N", title="task"),
            alt.Tooltip("dropped:N", title="without"),
            alt.Tooltip("share:Q", format=".1%"),
            alt.Tooltip("kept:Q", format=".1%"),
        ],
    )
    return alt.layer(base.mark_line(strokeWidth=1.5), points, data=ROWS).properties(height=HEIGHTS["kept"])
