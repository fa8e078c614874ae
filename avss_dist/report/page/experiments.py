"""The page's section on experiments: what they say, a chart of what every method keeps, and the numbers."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import altair as alt
import vl_convert

from avss_dist.analysis.sparsity_curves import is_sparse
from avss_dist.analysis.verdict import (
    CLAIMED_KEPT,
    WHOLE,
    kept_by_guess,
    lacks_interval,
    primary_metric,
    retention_interval,
    shown_method,
    shown_value,
    verdicts,
)
from avss_dist.names import LOSS
from avss_dist.report.chart import specification
from avss_dist.report.page.removal import named_task
from avss_dist.stats.retention import NO_INTERVAL

GRAY, BLUE, AMBER = "#8b949e", "#4c9be8", "#e0a030"  # seen on light and on dark
WIDTHS = {1: 700, 2: 450}  # of a plot, by their number, in pixels; with more of them there are three in a line
MOST_SHOWN = 1.5  # retention that the chart has room for
Row = Mapping[str, Any]  # of the table `experiments`


def experiments(rows: Sequence[Row], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """For the template: one entry for each run that has an experiment, in the order of ``labels`` (by run id).

    Args:
        rows: of ``experiments``, the newest last.
    """
    found: dict[str, dict[tuple[Any, ...], Row]] = {}
    for row in rows:  # of what was evaluated twice, the last counts
        key = shown_method(row), row["share"], row["sparsity"], row["task"], row["metric"]
        found.setdefault(row["run_id"], {})[key] = row
    of_layers = {run_id: [row for row in rows.values() if not is_sparse(row)] for run_id, rows in found.items()}
    return [
        _experiment(label, of_layers[run_id])
        for run_id, label in labels.items()
        if any(row["share"] for row in of_layers.get(run_id, ()))
    ]


def _experiment(label: str, rows: Sequence[Row]) -> dict[str, Any]:
    by_task: dict[str, list[Row]] = {}
    for row in rows:
        by_task.setdefault(row["task"], []).append(row)
    tasks = list(by_task)
    speaks = {task: primary_metric(of_task) for task, of_task in by_task.items()}
    guesses = {task: kept_by_guess(of_task, speaks[task]) for task, of_task in by_task.items()}
    shown = [row for row in rows if row["metric"] == speaks[row["task"]]]
    panels = len({(row["task"], row["share"]) for row in shown if row["method"] != WHOLE})
    return {
        "name": "experiment-" + label.partition(".")[0],
        "label": label,
        "verdicts": [
            *(verdicts(named(rows)) or ["No share of 25% by AVSS was tried."]),
            *([NO_INTERVAL] if lacks_interval(shown) else []),
        ],
        "wide": _image(shown, guesses, columns=3, width=WIDTHS.get(panels, 230), labels=230),
        "narrow": _image(shown, guesses, columns=1, width=130, labels=140),
        "columns": list(_columns(tasks, speaks)),
        "rows": [list(_cells(of, tasks)) for of in _by_method(shown)],
    }


def named(rows: Sequence[Row]) -> list[Row]:
    """Rows whose tasks are named as people read them."""
    return [{**row, "task": named_task(row["task"])} for row in rows]


def _by_method(rows: Sequence[Row]) -> Iterator[dict[str, Row]]:
    """Rows of a method and share, by task."""
    for key in dict.fromkeys((row["share"], shown_method(row)) for row in sorted(rows, key=lambda row: row["share"])):
        yield {row["task"]: row for row in rows if (row["share"], shown_method(row)) == key}


def _columns(tasks: Sequence[str], speaks: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    yield {"title": "layers chosen by", "number": False}
    yield {"title": "share", "number": True}
    yield {"title": "dropped", "number": False}
    for task in tasks:
        yield {"title": f"{named_task(task)}: {'perplexity' if speaks[task] == LOSS else speaks[task]}", "number": True}
        yield {"title": "kept", "number": True}
        yield {"title": "95% interval", "number": True}


def _cells(of: Mapping[str, Row], tasks: Sequence[str]) -> Iterator[dict[str, Any]]:
    first = next(iter(of.values()))
    yield {"text": shown_method(first), "value": shown_method(first)}
    yield {"text": f"{first['share']:.0%}", "value": first["share"]}
    yield {"text": ", ".join(map(str, first["drop"])), "value": len(first["drop"])}
    for task in tasks:
        row = of.get(task)
        if row is None:
            yield from ({"text": "", "value": ""} for _ in range(3))
            continue
        ends = retention_interval(row)
        yield {"text": shown_value(row), "value": row["value"]}
        yield {"text": f"{row['retention']:.1%}", "value": row["retention"]}
        yield {"text": f"{ends[0]:.1%} to {ends[1]:.1%}" if ends else "", "value": ends[0] if ends else ""}


def _image(rows: Sequence[Row], guesses: Mapping[str, float | None], *, columns: int, width: int, labels: int) -> str:
    """A dot for each method and task, with its interval, as a data URI of an SVG: ``columns`` tasks beside each other.

    ``width`` and ``labels`` are the pixels of a task's plot and of the methods' names.

    Lines are at what the claim says (dashed), and at what a guess keeps (dotted).
    """
    points = [
        {
            "method": shown_method(row),
            "task": f"{named_task(row['task'])}, {row['share']:.0%} dropped",
            "kept": min(row["retention"], MOST_SHOWN),
            "guess": guesses[row["task"]],
            "low": row["retention_low"],
            "high": row["retention_high"],
        }
        for row in rows
        if row["method"] != WHOLE
    ]
    order = list(dict.fromkeys(point["method"] for point in points))
    base = alt.Chart().encode(alt.Y("method:N", sort=order, title=None))
    interval = base.mark_rule(color=BLUE, clip=True).encode(alt.X("low:Q"), alt.X2("high:Q"))
    scale = alt.Scale(domain=[0, max([1.1, *(point["kept"] for point in points)])], clamp=True)
    dot = base.mark_point(filled=True, color=BLUE, size=45, opacity=1).encode(
        alt.X("kept:Q", scale=scale, title="retention", axis=alt.Axis(format="%", grid=False))
    )
    claim = alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(x=alt.datum(CLAIMED_KEPT))
    guess = alt.Chart().mark_rule(color=GRAY, strokeDash=[1, 3]).encode(alt.X("guess:Q", aggregate="max"))
    chart: Any = (
        alt.layer(claim, guess, interval, dot, data=alt.InlineData(values=points))
        .properties(width=width, height=alt.Step(15))
        .facet(
            alt.Facet(
                "task:N",
                title=None,
                header=alt.Header(labelColor=GRAY, labelLimit=width),
            ),
            columns=columns,
        )
        .configure(background="transparent", padding={"left": 30, "right": 5, "top": 5, "bottom": 5})
        .configure_axis(labelColor=GRAY, titleColor=GRAY, domainColor=GRAY, tickColor=GRAY, labelLimit=labels)
        .configure_view(stroke=None)
    )
    return as_image(chart)


def as_image(chart: Any) -> str:
    """A chart as a data URI of an SVG."""
    svg = vl_convert.vegalite_to_svg(specification(chart))
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"
