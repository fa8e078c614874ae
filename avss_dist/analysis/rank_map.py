"""Maps of ranks: layers by the points of an axis, with marks where a change is beyond the choice of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from avss_dist.analysis.changes import SeriesChanges
from avss_dist.analysis.section import Chart
from avss_dist.core.values import NewRow
from avss_dist.stats.layer_stats import Float64

if TYPE_CHECKING:
    from altair.typing import ChartType

LAYER_HEIGHT = 11  # pixels
MINIMUM_HEIGHT = 120  # pixels of a map
MARK_SIZE = 40  # square pixels
SCORE = "score"
RANK = "score and rank"
MARKS = {SCORE: "white", RANK: "#ff7f0e"}
"""Colors of the marks by what changed. They are seen on every color of a map."""


@dataclass(frozen=True, kw_only=True)
class MapAxis:
    """Axis of a map: the place of each point, and of the ends of its cells.

    Attributes:
        title: title of the axis.
        is_log: whether the axis is logarithmic.
        places: place of each point, ascending.
        edges: ends of the cells of the points, one more than there are points.
        has_zero: whether the first point is 0, which a logarithmic axis has elsewhere.
    """

    title: str
    is_log: bool
    places: tuple[float, ...]
    edges: tuple[float, ...]
    has_zero: bool


def map_axis(title: str, values: Sequence[float]) -> MapAxis:
    """Return the axis of a map, logarithmic if its narrowest cell is wider there than on a linear one.

    So it is logarithmic for checkpoints at powers of two, and linear for those in equal steps. Cells meet half way
    between neighbouring points. A point at 0 has half of the next one as its place on a logarithmic axis.

    Args:
        values: value of each point, from 0 on and ascending, at least two.
    """
    linear = np.array(values, float)
    positive = linear.copy()
    if positive[0] == 0:
        positive[0] = positive[1] / 2
    logarithms = np.log(positive)
    is_log = _narrowest(_edges(logarithms)) > _narrowest(_edges(linear))
    places = positive if is_log else linear
    edges = np.exp(_edges(logarithms)) if is_log else _edges(linear)
    return MapAxis(
        title=title,
        is_log=is_log,
        places=tuple(places.tolist()),
        edges=tuple(edges.tolist()),
        has_zero=bool(linear[0] == 0),
    )


def _edges(places: Float64) -> Float64:
    """Return the ends of cells that meet half way between places, float64[places + 1]."""
    between = (places[1:] + places[:-1]) / 2
    first = 2 * places[0] - between[0]
    last = 2 * places[-1] - between[-1]
    return np.array([first, *between, last])


def _narrowest(edges: Float64) -> float:
    """Return the width of the narrowest cell, relative to that of all."""
    return float(np.diff(edges).min() / (edges[-1] - edges[0]))


@dataclass(frozen=True, kw_only=True, eq=False)
class RankMap:
    """Ranks of layers at the points of an axis.

    Attributes:
        axis: the axis.
        points: name of each point.
        run_ids: run of each point.
        layers: numbers of the layers.
        ranks: 1 for the lowest, float64[points, layers].
        changes: changes between neighbouring points; None if nothing is claimed about them.
    """

    axis: MapAxis
    points: Sequence[str]
    run_ids: Sequence[str]
    layers: Sequence[int]
    ranks: Float64
    changes: SeriesChanges | None

    def chart(self, name: str, title: str) -> Chart:
        """Return the map as a chart of a report.

        Args:
            name: base name of its files.
        """
        meaning = "A column for each point, a cell for each layer; dark layers are the least important."
        if self.changes is not None:
            meaning += (
                " A dot: the layer's score changed since the point before beyond the choice of text; where the dot is "
                "orange, its rank did, too."
            )
        drawing = partial(draw, self.axis, len(self.layers), has_marks=self.changes is not None)
        return Chart(name=name, title=title, meaning=meaning, rows=self.cells(), draw=drawing)

    def cells(self) -> list[NewRow]:
        """Return a row for each point and layer, for `draw`."""
        cells = []
        for place in range(len(self.points)):
            for column in range(len(self.layers)):
                cell = self._cell(place, column)
                if self.changes is not None:
                    cell |= _change(self.changes, place, self.layers[column])
                cells.append(cell)
        return cells

    def _cell(self, place: int, column: int) -> NewRow:
        """Return the row of a point and a layer, without its change."""
        rank = self.ranks[place, column].item()
        return {
            "point": self.points[place],
            "from": self.axis.edges[place],
            "to": self.axis.edges[place + 1],
            "layer": self.layers[column],
            "run": self.run_ids[place],
            "rank": rank,
            "share": round((rank - 1) / (len(self.layers) - 1), 4),
        }


def _change(changes: SeriesChanges, place: int, layer: int) -> NewRow:
    """Return the columns of a cell about the change since the point before, which the first point has not.

    ``changed`` is one of `MARKS`, or empty.
    """
    if place == 0 or layer not in changes.layers:
        return {"changed": "", "change": None, "p": None}
    before = place - 1
    column = changes.layers.index(layer)
    changed = ""
    if changes.rank_moved[before, column]:
        changed = RANK
    elif changes.is_changed[before, column]:
        changed = SCORE
    return {"changed": changed, "change": changes.change[before, column].item(), "p": changes.p[before, column].item()}


def draw(axis: MapAxis, num_layers: int, *, has_marks: bool) -> ChartType:
    """Return the chart of a map: cells by point and layer, and marks at their left ends.

    Args:
        has_marks: whether changes were tested.
    """
    import altair as alt

    title = axis.title
    scale = alt.Scale(domain=[axis.edges[0], axis.edges[-1]], nice=False, zero=False)
    if axis.is_log:
        title += " (log)"
        scale = alt.Scale(type="log", domain=[axis.edges[0], axis.edges[-1]], nice=False)
    label = "format(datum.value, ',')"
    if axis.has_zero:
        label = f"datum.value == {axis.places[0]!r} ? '0' : {label}"
    point_axis = alt.Axis(
        values=list(axis.places),
        labelExpr=label,
        labelAngle=-45,
        labelOverlap="greedy",
        labelLimit=120,
        grid=False,
    )
    layers = alt.Y("layer:O", sort="descending", title="layer").axis(labelOverlap="greedy")
    legend = alt.Legend(title="rank: 0 least, 1 most important", orient="top", direction="horizontal", titleLimit=240)
    shares = alt.Color("share:Q", scale=alt.Scale(domain=[0, 1], scheme="viridis"), legend=legend)
    tooltip = [
        alt.Tooltip("point:N"),
        alt.Tooltip("run:N"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("rank:Q", format=".1f"),
    ]
    if has_marks:
        tooltip += [
            alt.Tooltip("changed:N"),
            alt.Tooltip("change:Q", format="+.3g"),
            alt.Tooltip("p:Q", format=".2g"),
        ]
    base = alt.Chart().encode(x=alt.X("from:Q", title=title, scale=scale, axis=point_axis), y=layers, tooltip=tooltip)
    cells = base.mark_rect().encode(x2="to:Q", color=shares)
    height = max(MINIMUM_HEIGHT, LAYER_HEIGHT * num_layers)
    if not has_marks:
        return cells.properties(height=height)
    kinds = alt.Scale(domain=list(MARKS), range=list(MARKS.values()))
    mark_legend = alt.Legend(title="changed", orient="top", direction="horizontal", symbolStrokeColor="black")
    marks = base.transform_filter("datum.changed")
    marks = marks.mark_point(filled=True, stroke="black", strokeWidth=0.8, size=MARK_SIZE, opacity=1)
    marks = marks.encode(fill=alt.Fill("changed:N", scale=kinds, legend=mark_legend))
    return alt.layer(cells, marks).properties(height=height)
