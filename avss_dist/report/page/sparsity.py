"""The page's section on sparse activations: what each method keeps, and the sparsities of the newest plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import altair as alt

from avss_dist.analysis.sparsity_curves import ENOUGH, Curve, sparsity_curves
from avss_dist.analysis.verdict import lacks_interval, retention_interval, shown_value
from avss_dist.report.chart import COLORS
from avss_dist.report.page.experiments import GRAY, as_image
from avss_dist.report.page.removal import named_task
from avss_dist.stats.retention import NO_INTERVAL

if TYPE_CHECKING:
    from avss_dist.warehouse.reader import Warehouse

Row = Mapping[str, Any]  # of the table `experiments`, or `sparsity`
CURVE_COLUMNS = (
    "task",
    "sparsity by",
    "planned",
    "measured",
    "maps within 1 point",
    "farthest map, points",
    "value",
    "kept",
    "95% interval",
)
MAP_COLUMNS = ("layer", "map", "site", "zero by", "value", "sparsity")


def sparse_sections(warehouse: Warehouse, labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """For the template: one entry for each run that has sparsities or plans of them, in the order of ``labels``."""
    tried, planned = (
        _by_run(warehouse.table(name, run_ids=list(labels)).to_pylist()) for name in ("experiments", "sparsity")
    )
    found = []
    for run_id, label in labels.items():
        curves = sparsity_curves(_latest(tried.get(run_id, ())))
        maps = _newest(planned.get(run_id, ()))
        if curves or maps:
            found.append(_section(label, curves, maps))
    return found


def _by_run(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["created_at"]):
        found.setdefault(row["run_id"], []).append(row)
    return found


def _latest(rows: Sequence[Row]) -> list[Row]:
    """Of what was evaluated twice, the last counts."""
    keys = ("method", "share", "sparsity", "task", "metric")
    return list({tuple(row[name] for name in (*keys, "repair")): row for row in rows}.values())


def _newest(rows: Sequence[Row]) -> list[Row]:
    """The maps of the plan that was made last."""
    return [row for row in rows if row["sparsity_plan"] == rows[-1]["sparsity_plan"]]


def _section(label: str, curves: Sequence[Curve], maps: Sequence[Row]) -> dict[str, Any]:
    name = "sparsity-" + label.partition(".")[0]
    tables = []
    lacking = lacks_interval([point.row for curve in curves for point in curve.points])
    if rows := [_cells(curve, point) for curve in curves for point in curve.points]:
        tables.append(_table(f"{name}-curves", "Each method at each sparsity", CURVE_COLUMNS, rows))
    if maps:
        of = maps[0]
        title = f"The plan that was made last: {of['method']}, {of['target']:.0%} of the weights, rule {of['rule']}"
        cells = [[row[one] for one in ("layer", "map", "site", "by", "value", "sparsity")] for row in maps]
        tables.append(_table(f"{name}-maps", title, MAP_COLUMNS, [[*map(_cell, row)] for row in cells]))
    return {
        "label": label,
        "sentences": [*(curve.sentence for curve in curves), *([NO_INTERVAL] if lacking else [])],
        "curves": _curves_image(curves) if rows else None,
        "maps": _maps_image(maps) if maps else None,
        "tables": tables,
    }


def _table(name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    numbers = [isinstance(cell["value"], (int, float)) for cell in rows[0]]
    described = [{"title": one, "number": number} for one, number in zip(columns, numbers, strict=True)]
    return {"name": name, "title": title, "columns": described, "rows": rows}


def _cells(curve: Curve, point: Any) -> list[dict[str, Any]]:
    ends = retention_interval(point.row)
    return [
        _cell(named_task(curve.task)),
        _cell(curve.method),
        {"text": f"{point.target:.0%}", "value": point.target},
        {"text": "" if point.measured is None else f"{point.measured:.1%}", "value": point.measured or 0.0},
        {"text": "" if point.within is None else f"{point.within:.0%}", "value": point.within or 0.0},
        {"text": "" if point.farthest is None else f"{100 * point.farthest:.1f}", "value": point.farthest or 0.0},
        {"text": shown_value(point.row), "value": point.row["value"]},
        {"text": f"{point.kept:.1%}", "value": point.kept},
        {"text": f"{ends[0]:.1%} to {ends[1]:.1%}" if ends else "", "value": ends[0] if ends else 0.0},
    ]


def _cell(value: Any) -> dict[str, Any]:
    return {"text": f"{value:z.4g}" if isinstance(value, float) else str(value), "value": value}


def _curves_image(curves: Sequence[Curve]) -> str:
    """Retention by sparsity, a line for each method with its interval; tasks beside each other."""
    points = [
        {
            "task": named_task(curve.task),
            "method": curve.method,
            "sparsity": point.target,
            "kept": point.kept,
            "low": point.row["retention_low"],
            "high": point.row["retention_high"],
        }
        for curve in curves
        for point in curve.points
    ]
    x = alt.X("sparsity:Q", title="sparsity", axis=alt.Axis(format="%", grid=False))
    y = alt.Y("kept:Q", title="retention", axis=alt.Axis(format="%"))
    color = alt.Color("method:N", title=None, scale=COLORS, legend=alt.Legend(orient="bottom", labelColor=GRAY))
    base = alt.Chart().encode(x, color=color)
    enough = [alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(y=alt.datum(kept)) for kept in ENOUGH]
    bars = base.mark_rule().encode(alt.Y("low:Q"), alt.Y2("high:Q"))
    drawn = alt.layer(*enough, bars, base.mark_line(point=True).encode(y), data=alt.InlineData(values=points))
    faceted = drawn.properties(width=300, height=210).facet(
        alt.Facet("task:N", title=None, header=alt.Header(labelColor=GRAY)), columns=2
    )
    return as_image(_quiet(faceted))


def _maps_image(maps: Sequence[Row]) -> str:
    """The sparsity of every linear map, by layer."""
    points = [{"layer": row["layer"], "map": row["map"], "sparsity": row["sparsity"]} for row in maps]
    order = list(dict.fromkeys(row["map"] for row in maps))
    chart = (
        alt.Chart(alt.InlineData(values=points))
        .mark_rect()
        .encode(
            alt.X("layer:O", title="layer (from 0)"),
            alt.Y("map:N", sort=order, title=None),
            alt.Color("sparsity:Q", legend=alt.Legend(format="%", labelColor=GRAY, titleColor=GRAY)),
        )
        .properties(width=alt.Step(16), height=alt.Step(18))
    )
    return as_image(_quiet(chart))


def _quiet(chart: Any) -> Any:
    return (
        chart.configure(background="transparent", padding=5)
        .configure_axis(labelColor=GRAY, titleColor=GRAY, domainColor=GRAY, tickColor=GRAY, labelLimit=200)
        .configure_view(stroke=None)
    )
