"""Charts of layer scores and baselines by depth, as PNG, SVG or a self-contained page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import altair as alt
import numpy as np
import vl_convert

from avss_dist.analysis.agreement import SimilarityMap
from avss_dist.analysis.comparison import RankingComparison
from avss_dist.analysis.findings import describe_depth
from avss_dist.core.endings import require_picture
from avss_dist.core.errors import QueryError
from avss_dist.core.files import cache_folder, write_file, write_output
from avss_dist.core.text import basename, count_of, describe_count, printable
from avss_dist.core.thresholds import describe_threshold
from avss_dist.core.values import JsonObject, NewRow, TableRow
from avss_dist.reports.output import map_leaves
from avss_dist.stats.catalog import FROM_ACTIVATIONS, SCORES
from avss_dist.stats.intervals import why_no_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, depth_correlation, rank_lowest
from avss_dist.warehouse.reader import grouped

if TYPE_CHECKING:
    from altair.typing import ChartType

MAX_RUNS = 100  # in a chart: its ten colors repeat long before, and the library that draws holds every point
MAX_LABELED = 60  # rows of a similarity map with a name beside each
SIDE = 560  # pixels of a similarity map
STRIP_WIDTH = 14  # pixels of the groups beside it
COLORS = alt.Scale(scheme="tableau10")
SINGLE_COLOR = "#1f77b4"  # of the only run of a chart
NUMBER_LENGTH = 10  # digits at the end of an id, which differ between runs
LOWEST_COLOR = "#d62728"
ROWS = alt.NamedData(name="rows")  # the data of the charts of a page


def layers_chart(runs: Sequence[TableRow], scores: Sequence[TableRow], own: Sequence[str] = ()) -> ChartType:
    """Return a chart of smoothed AVSS with its interval, and of each other score, by layer (by depth for several runs).

    Triangles mark the lowest 25% of the layers by each score.

    Args:
        runs: rows of ``runs``.
        scores: rows of ``scores`` of these runs, of one site, recipe and threshold.
        own: columns of these rows that have scores of people's own.

    Raises:
        QueryError: there are too many runs for one chart.
    """
    if len(runs) > MAX_RUNS:
        raise QueryError(
            f"{len(runs):,} runs are too many for one chart: the maximum is {MAX_RUNS}.",
            "Name fewer with `run`; avss report draws the runs of a whole warehouse.",
        )
    fields = _fields(own)
    labels = {run["run_id"]: _label(run) for run in runs}
    by_run = grouped(scores, itemgetter("run_id"))
    rows = []
    for run_id, label in labels.items():
        rows += _drawn_rows(by_run.get(run_id, []), label, fields)
    base = alt.Chart(alt.InlineData(values=rows))
    color: alt.Color | alt.Value
    if len(runs) > 1:
        base = base.encode(x=alt.X("depth:Q", title="relative depth"))
        legend = alt.Legend(orient="bottom", columns=2, symbolType="circle", symbolOpacity=1)
        color = alt.Color("run:N", title=None, scale=COLORS, legend=legend)
        title = f"Layer scores of {len(runs)} runs"
    else:
        base = base.encode(x=layer_axis())
        color = alt.value(SINGLE_COLOR)
        title = f"Layer scores of {labels[runs[0]['run_id']]}"
    panels = []
    for field in fields:
        if field.name == "avss" or any(row[field.name] is not None for row in rows):
            panels.append(_panel(base, color, rows, field.name, field.title))
    subtitle = list(_subtitle(runs, scores, rows))
    chart = alt.concat(*panels, columns=3)
    return (
        chart.properties(title=alt.TitleParams(title, subtitle=subtitle, anchor="start"), padding=12)
        .configure_view(strokeOpacity=0.3)
        .configure_axis(gridOpacity=0.4)
        .resolve_scale(y="independent")
    )


def _label(run: TableRow) -> str:
    """Return the name of a run: its model, and the end of its id, which differs between runs."""
    number = run["run_id"][-NUMBER_LENGTH:]
    return f"{basename(run['model'])} ({number})"


class _Field(NamedTuple):
    """A score in the data of a chart.

    Attributes:
        name: its name there.
        column: column of ``scores`` that has it.
        title: its title.
    """

    name: str
    column: str
    title: str


def _fields(own: Sequence[str]) -> list[_Field]:
    """Return the scores of a chart.

    Args:
        own: columns that have scores of people's own.
    """
    fields = []
    for name in FROM_ACTIVATIONS:
        fields.append(_Field(name, SCORES[name].column, SCORES[name].title))
    for number, column in enumerate(own):
        # In names of fields, dots and brackets have a meaning. Names of files have both.
        fields.append(_Field(f"own_{number}", column, basename(column)))
    return fields


def _drawn_rows(scores: Sequence[TableRow], label: str, fields: Sequence[_Field]) -> list[NewRow]:
    """Return a row for each layer of a run, ready for JSON, with its scores and whether they are among the lowest.

    Args:
        scores: rows of ``scores`` of the run.
        label: name of the run.
    """
    num_lowest = count_lowest(len(scores))
    ranks = {field.name: _ranks(scores, field) for field in fields}
    rows = []
    for place, score in enumerate(scores):
        row = {name: score[name] for name in ("layer", "layer_name", "depth", "rank", "avss_low", "avss_high")}
        for field in fields:
            row[field.name] = score[field.column]
        row["run"] = label
        for field in fields:
            row[f"lowest_{field.name}"] = bool(ranks[field.name][place] <= num_lowest)
        rows.append(row)
    return rows


def _ranks(scores: Sequence[TableRow], field: _Field) -> Float64:
    """Return the rank of each layer by a score, float64[layers], with NaN for layers without one."""
    if field.name == "avss":
        # Layers with NaN or infinities have a score, and no rank.
        return np.array([score["rank"] for score in scores], float)
    return rank_lowest(np.array([score[field.column] for score in scores], float))


def _subtitle(runs: Sequence[TableRow], scores: Sequence[TableRow], rows: Sequence[TableRow]) -> Iterator[str]:
    """Yield the lines below the title of a chart of layers: the measurement, and a warning of a single run.

    Args:
        rows: as returned by `_drawn_rows`.
    """
    first = scores[0]
    threshold = describe_threshold(first["threshold"], first["threshold_kind"])
    corpora = dict.fromkeys(basename(run["corpus"] or "?") for run in runs)
    dtypes = dict.fromkeys(run["dtype"] or "?" for run in runs)
    most_shards = max(run["num_shards"] or 0 for run in runs)
    band = why_no_interval(most_shards) or ""
    if any(row["avss_low"] is not None for row in rows):
        band = "Band: 95% interval over shards."
    yield (
        f"Smoothed AVSS: {first['site']} site, {first['recipe']} recipe, |x| < {threshold}; "
        f"{_describe_tokens(runs)} tokens of {', '.join(corpora)}, {', '.join(dtypes)}. "
        f"Triangles: the 25% of layers that are lowest in each picture. {band}"
    )
    if len(runs) == 1:
        values = [score["avss_smoothed"] for score in sorted(scores, key=itemgetter("layer"))]
        warning = describe_depth("Smoothed AVSS", depth_correlation(values), len(values))
        if warning:
            yield warning


def _describe_tokens(runs: Sequence[TableRow]) -> str:
    """Return the number of tokens of runs, or the smallest and the largest, as text."""
    numbers = sorted({run["num_tokens"] for run in runs if run["num_tokens"] is not None})
    if len(numbers) < 2:
        return describe_count(next(iter(numbers), None))
    return f"{describe_count(numbers[0])} to {describe_count(numbers[-1])}"


def layer_axis() -> alt.X:
    """Return the axis of layers."""
    return alt.X("layer:Q", title="layer (from 0)").axis(format="d", tickMinStep=1).scale(nice=False)


def depth_chart(
    base: alt.Chart,
    name: str,
    title: str,
    color: alt.Color | alt.Value,
    *,
    log: bool,
    linear: alt.Scale,
    lowest: str,
    red: bool = True,
    ends: tuple[str, str] | None,
    tooltip: Sequence[alt.Tooltip],
) -> ChartType:
    """Return a chart of a score by depth: a line with a point for each layer, and triangles for the lowest layers.

    Intervals are a line at each layer and a band between layers, with a gap at a layer without one.

    Args:
        base: chart that encodes the position of a layer.
        name: the score, and the column that has it.
        title: title of the score.
        color: color of lines, bands and points.
        log: whether the score is on a log scale, and else on ``linear``.
        lowest: column that is true for the lowest layers.
        red: whether the points of the lowest layers are red.
        ends: columns of the ends of intervals, of which at least one is known, or None to draw none.
    """
    marked = alt.when(f"datum.{lowest}")
    shape = marked.then(alt.value("triangle-down")).otherwise(alt.value("circle"))
    size = marked.then(alt.value(80)).otherwise(alt.value(32))
    axis: dict[str, Any] = {"title": title, "scale": linear}
    if log:
        axis = {"title": f"{title} (log)", "scale": alt.Scale(type="log")}
    color_of_point = marked.then(alt.value(LOWEST_COLOR)).otherwise(color) if red else color
    points = base.mark_point(filled=True, opacity=1).encode(
        y=alt.Y(f"{name}:Q", **axis),
        color=color_of_point,
        shape=shape,
        size=size,
        tooltip=list(tooltip),
    )
    line = base.mark_line(strokeWidth=1.5).encode(y=alt.Y(f"{name}:Q", **axis), color=color)
    if ends is None:
        return alt.layer(line, points)
    low, high = ends
    interval = base.encode(y=alt.Y(f"{low}:Q", **axis), y2=f"{high}:Q", color=color)
    band = interval.mark_area(opacity=0.2, invalid="break-paths-filter-domains")
    # The band has no width at a layer whose neighbours have no interval. The line shows it there.
    return alt.layer(band, interval.mark_rule(opacity=0.4), line, points)


def _panel(base: alt.Chart, color: alt.Color | alt.Value, rows: Sequence[TableRow], name: str, title: str) -> ChartType:
    """Return the chart of a score, on a log scale unless a layer scores zero or less."""
    values = [row[name] for row in rows]
    tooltip = [
        alt.Tooltip("run:N"),
        alt.Tooltip("layer:Q"),
        alt.Tooltip("layer_name:N"),
        alt.Tooltip(f"{name}:Q", title=name if name in SCORES else title, format=".4g"),
    ]
    ends = None
    if name == "avss":
        tooltip.append(alt.Tooltip("rank:Q"))
        lows = [row["avss_low"] for row in rows]
        values += lows
        if any(low is not None for low in lows):
            ends = ("avss_low", "avss_high")
    return depth_chart(
        base,
        name,
        title,
        color,
        log=all(value is None or value > 0 for value in values),
        linear=alt.Scale(type="linear"),
        lowest=f"lowest_{name}",
        red=not isinstance(color, alt.Color),  # of several runs, points have the color of their run
        ends=ends,
        tooltip=tooltip,
    ).properties(title=title, width=300, height=210)


def similarity_chart(comparison: RankingComparison) -> ChartType:
    """Return a heat map of the rank correlations of runs, ordered by similarity, beside a strip of their groups.

    Args:
        comparison: a comparison with a similarity map.
    """
    similarity = comparison.similarity
    assert similarity is not None
    labels = [f"{position}. {label}" for position, label in enumerate(similarity.labels, start=1)]
    few = len(labels) <= MAX_LABELED
    axis = alt.Axis(labels=few, ticks=few, domain=False, labelLimit=260)
    y = alt.Y("row:N", sort=labels, title=None)
    groups = []
    for label, group in zip(labels, similarity.groups, strict=True):
        groups.append({"row": label, "group": group})
    strip = alt.Chart(alt.InlineData(values=groups)).mark_rect()
    strip = strip.encode(
        y=y.axis(axis),
        color=alt.Color("group:N", title=None, scale=COLORS, legend=alt.Legend(orient="left")),
        tooltip=[alt.Tooltip("row:N", title="runs"), alt.Tooltip("group:N")],
    ).properties(width=STRIP_WIDTH, height=SIDE)
    tooltip = [
        alt.Tooltip("row:N", title="runs"),
        alt.Tooltip("column:N", title="with"),
        alt.Tooltip("rho:Q", title="rank correlation", format=".3f"),
    ]
    scale = alt.Scale(domain=[-1, 0, 1], scheme="redblue")
    legend = alt.Legend(title="rank correlation", orient="right")
    heat = alt.Chart(alt.InlineData(values=_similarity_cells(similarity, labels))).mark_rect()
    heat = heat.encode(
        x=alt.X("column:N", sort=labels, title=None, axis=None),
        y=y.axis(None),
        color=alt.Color("rho:Q", scale=scale, legend=legend),
        tooltip=tooltip,
    ).properties(width=SIDE, height=SIDE)
    title = alt.TitleParams("Agreement of layer rankings", subtitle=_describe_map(similarity), anchor="start")
    return (
        alt.hconcat(strip, heat, spacing=2)
        .resolve_scale(color="independent")
        .properties(title=title, padding=12)
        .configure_view(strokeOpacity=0)
    )


def _similarity_cells(similarity: SimilarityMap, labels: Sequence[str]) -> list[NewRow]:
    """Return a row for each cell of a map that has a correlation.

    Args:
        labels: names of its rows and columns.
    """
    cells = []
    for (row, column), rho in np.ndenumerate(similarity.rho):
        if np.isfinite(rho):
            cells.append({"row": labels[row], "column": labels[column], "rho": round(float(rho), 4)})
    return cells


def _describe_map(similarity: SimilarityMap) -> str:
    """Return sentences on the runs that a map shows, and on those that it does not."""
    text = f"{count_of(similarity.scores, 'run')}, ordered by average-linkage clustering of 1 - rank correlation."
    if similarity.scores > len(similarity.labels):
        text += " A cell is the mean over the pairs of neighbouring runs."
    if similarity.left_out:
        text += f" The {similarity.left_out:,} oldest runs are left out."
    if similarity.mismatched:
        text += f" {describe_mismatched(similarity)}"
    return text


def describe_mismatched(similarity: SimilarityMap) -> str:
    """Return a sentence on the runs that were measured under other conditions than those on a map."""
    number = similarity.mismatched
    verb = "is" if number == 1 else "are"
    return f"{count_of(number, 'run')} under other conditions {verb} not on it."


def save_chart(chart: ChartType, path: Path, title: str) -> None:
    """Write a chart as ``.png`` (twice the screen's resolution), ``.svg``, or ``.html`` that needs no network.

    Args:
        title: name of the page, for people who do not see it, too.

    Raises:
        QueryError: the file has another ending.
        AvssError: it cannot be written.
    """
    require_picture(path)
    kind = path.suffix.lower()
    # The library that draws aborts the process at texts that are not printable.
    spec = map_leaves(chart.to_dict(), _as_drawable)
    if kind == ".png":
        data = vl_convert.vegalite_to_png(spec, scale=2)
    elif kind == ".svg":
        data = vl_convert.vegalite_to_svg(spec).encode()
    else:
        data = _chart_page(spec, title).encode()
    write_output(path, data)


def _as_drawable(leaf: object) -> object:
    """Return a leaf of a specification, and a text without surrogates and characters that are not printable."""
    if isinstance(leaf, str):
        return printable(leaf).encode(errors="replace").decode()
    return leaf


def _chart_page(spec: JsonObject, title: str) -> str:
    """Return a page that draws a chart, and needs no network."""
    # No name in the data can end the script that it stands in.
    text = json.dumps(spec).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"></head>
<body><div id="chart" role="img" aria-label="{title}"></div>
<script type="application/json" id="spec">{text}</script>
<script>{drawing_library()}</script>
<script>vegaEmbed("#chart", JSON.parse(document.getElementById("spec").textContent), {{renderer: "svg"}});</script>
</body></html>
"""


@cache
def drawing_library() -> str:
    """Return the code that draws: Vega, Vega-Lite and vega-embed, with an interpreter in place of ``eval``.

    Bundling it takes seconds, so that it is kept in the user's cache.
    """
    file = cache_folder("vega", f"{version('vl-convert-python')}.js")
    with suppress(OSError, UnicodeDecodeError):
        return file.read_text(encoding="utf-8")
    library = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    with suppress(OSError):  # the cache cannot be written
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_file(file, library)
    return library
