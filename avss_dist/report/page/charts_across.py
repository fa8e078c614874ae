"""The charts of runs beside each other, as Vega-Lite; see `charts`."""

from __future__ import annotations

from typing import Any

import altair as alt

from avss_dist.report.chart import LOWEST_COLOR
from avss_dist.report.page.experiments import GRAY

ROWS = alt.NamedData(name="rows")
HEIGHTS = {"profiles": 280, "lowest": 280, "drift": 220}
STRONG = 0.6  # a cell of such a correlation is dark enough for light numbers
ROOM = alt.param(name="room", value=180)  # for the labels of runs, in pixels
OF_RUNS = (alt.param(name="names", value=["", ""]), alt.param(name="which", value=[0]))
"""Labels of the run and of the one that it is compared with, and which of them are there."""
_DEPTHS = alt.X("from:Q", title="relative depth", scale=alt.Scale(domain=[0, 1])).axis(tickCount=5, grid=False)
_OF_LAYER = [
    alt.Tooltip("run:N"),
    alt.Tooltip("layer:Q"),
    alt.Tooltip("rank:Q"),
    alt.Tooltip("value:Q", title="score", format=".4g"),
]


def charts_across() -> dict[str, Any]:
    """Charts by name."""
    profiles = {f"profiles:{scale}": _profiles(scale) for scale in ("log", "linear")}
    return {"heat": _heat(), **profiles, "lowest": _lowest(), "correlation": _correlation(), "drift": _drift()}


def color_of_runs() -> Any:
    """Of the run that is chosen, and of the one that it is compared with."""
    legend = alt.Legend(
        orient="top",
        columns=1,
        title=None,
        labelLimit=alt.ExprRef("limit"),
        labelExpr="names[datum.value]",
        symbolOpacity=1,
        symbolType="circle",
        values=alt.ExprRef("which"),
    )
    return alt.Color("which:N", scale=alt.Scale(domain=[0, 1], range="category"), legend=legend)


def _runs_axis(field: str, title: str | None = None) -> Any:
    """Runs by their labels, in the order of the rows."""
    return alt.Y(f"{field}:N", title=title, sort=None).axis(labelLimit=alt.ExprRef("room"), ticks=False, domain=False)


def _heat() -> Any:
    """A row for each run, a cell for each layer, colored by the layer's place in the ranking."""
    legend = alt.Legend(title="rank: 0 least, 1 most important", orient="top", direction="horizontal", titleLimit=240)
    return (
        alt.Chart(ROWS)
        .mark_rect()
        .encode(
            x=_DEPTHS,
            x2="to:Q",
            y=_runs_axis("run"),
            color=alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=legend),
            tooltip=_OF_LAYER,
        )
        .add_params(ROOM)
    )


def _profiles(scale: str) -> Any:
    """A line for each run: gray, but for the one that is chosen and the one that it is compared with."""
    y_scale: Any = alt.Scale(type="log") if scale == "log" else alt.Scale(zero=False)
    y_title = "score (log)" if scale == "log" else "score"
    chosen = alt.when("datum.which < 2")
    return (
        alt.Chart(ROWS)
        .mark_line()
        .encode(
            x=alt.X("depth:Q", title="relative depth").scale(domain=[0, 1]),
            y=alt.Y("value:Q", title=y_title, scale=y_scale).axis(grid=False, tickCount=6),
            detail="run:N",
            color=chosen.then(color_of_runs()).otherwise(alt.value(GRAY)),
            opacity=chosen.then(alt.value(1)).otherwise(alt.value(0.45)),
            strokeWidth=chosen.then(alt.value(2.5)).otherwise(alt.value(1)),
            tooltip=[alt.Tooltip("run:N")],
        )
        .add_params(*OF_RUNS)
        .properties(height=HEIGHTS["profiles"])
    )


def _lowest() -> Any:
    """A bar for each place: how many runs have it in their lowest 25%. Dashed: as many as chance would have there."""
    bars = (
        alt.Chart()
        .mark_rect(color=LOWEST_COLOR, opacity=0.8)
        .encode(
            x=_DEPTHS,
            x2="to:Q",
            y=alt.Y("share:Q", title="of the runs", scale=alt.Scale(domain=[0, 1])).axis(format="%", tickCount=5),
            y2=alt.datum(0),
            tooltip=[alt.Tooltip("place:N"), alt.Tooltip("share:Q", title="of the runs", format=".0%")],
        )
    )
    chance = alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(alt.Y("chance:Q", aggregate="max"))
    return alt.layer(bars, chance, data=ROWS).properties(height=HEIGHTS["lowest"])


def _drift() -> Any:
    """Along a training: how far each checkpoint ranks layers as the last one does, and as the one before it."""
    legend = alt.Legend(orient="top", title=None, symbolOpacity=1, columns=1)
    labels = alt.Axis(labelAngle=-45, labelOverlap="greedy", labelLimit=120, grid=False)
    base = alt.Chart().encode(
        x=alt.X("checkpoint:N", title=None, sort=None, axis=labels),
        y=alt.Y("correlation:Q", title="rank correlation", scale=alt.Scale(zero=False)),
        color=alt.Color("with:N", sort=None, legend=legend, scale=alt.Scale(range="category")),
    )
    tooltip = [
        alt.Tooltip("checkpoint:N"),
        alt.Tooltip("with:N"),
        alt.Tooltip("correlation:Q", format=".3f"),
    ]
    points = base.mark_point(filled=True, size=40, opacity=1).encode(
        shape=alt.Shape("with:N", sort=None, legend=None), tooltip=tooltip
    )
    return alt.layer(base.mark_line(strokeWidth=1.5), points, data=ROWS).properties(height=HEIGHTS["drift"])


def _correlation() -> Any:
    """A cell for each pair of runs; the number is written where there is room for it."""
    legend = alt.Legend(title="rank correlation", orient="top", direction="horizontal")
    base = alt.Chart().encode(
        x=alt.X("column:N", title="number of the run", sort=None).axis(
            labelAngle=0, ticks=False, domain=False, labelOverlap="greedy"
        ),
        y=_runs_axis("run"),
    )
    cells = base.mark_rect().encode(
        color=alt.Color(
            "correlation:Q",
            scale=alt.Scale(domain=[-1, 0, 1], range="diverging", type="linear", interpolate="lab"),
            legend=legend,
        ),
        tooltip=[
            alt.Tooltip("run:N"),
            alt.Tooltip("other:N", title="with"),
            alt.Tooltip("kind:N", title="is"),
            alt.Tooltip("correlation:Q", format=".3f"),
        ],
    )
    numbers = base.encode(text=alt.Text("correlation:Q", format=".2f"))
    texts = [
        numbers.mark_text(style=style, fontSize=10).transform_filter(
            f"datum.written && isValid(datum.correlation) && {where}"
        )
        for style, where in (
            ("weak", f"abs(datum.correlation) < {STRONG}"),
            ("strong", f"abs(datum.correlation) >= {STRONG}"),
        )
    ]
    return alt.layer(cells, *texts, data=ROWS).add_params(ROOM)
