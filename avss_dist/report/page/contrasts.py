"""The page's section on paired text: what is left of contrasts, a chart of each with its controls, and the numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import altair as alt

from avss_dist.analysis.contrast import Contrast, contrast
from avss_dist.errors import QueryError
from avss_dist.report.page.experiments import AMBER, BLUE, GRAY, as_image

if TYPE_CHECKING:
    from avss_dist.warehouse.reader import Warehouse

Row = Mapping[str, Any]  # of `Contrast.layers`
SERIES = {
    "deviation": "after their own prompts",
    "length_matched": "pairs of about equal length",
    "after_another": "after another prompt",
}
"""Columns that the chart draws, and what the answers are."""
COLUMNS = {
    "eavss_contrast": "contrast",
    "eavss_contrast_low": "from",
    "eavss_contrast_high": "to",
    "rank": "rank",
    "prone_probability": "in top 25%",
    "deviation": "deviation",
    "p_holm": "p",
    "noise_floor": "noise",
    "length_matched": "length-matched",
    "length_matched_p": "its p",
    "after_another": "other prompt",
    "stands": "left",
}
"""Columns of the table, and their titles."""


def contrasts(
    warehouse: Warehouse, runs: Sequence[Mapping[str, Any]], labels: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """For the template: one entry for each run on paired text, at the published reading.

    Args:
        runs: rows of ``runs``.
        labels: how the page calls them, by run id.
    """
    strata = warehouse.table("stratum_stats", run_ids=[run["run_id"] for run in runs], columns=["run_id"])
    paired = set(strata["run_id"].to_pylist())
    for run in (run for run in runs if run["run_id"] in paired):
        label = labels[run["run_id"]]
        try:
            found = contrast(warehouse, run, site=(run["sites"] or ["block"])[0])
        except QueryError as error:
            yield {"label": label, "findings": [f"{error.message} {error.hint or ''}"], "wide": None}
            continue
        yield _entry(label, found)


def _entry(label: str, found: Contrast) -> dict[str, Any]:
    rows, of = found.layers.to_pylist(), found.reading
    return {
        "name": "contrast-" + label.partition(".")[0],
        "label": label,
        "reading": f"{of['hallucinated']} against {of['truthful']} answers, {of['pairs']} pairs; {of['site']}, "
        f"{of['recipe']}, below {of['threshold']}.",
        "findings": found.findings,
        "wide": _image(rows, width=620),
        "narrow": _image(rows, width=250),
        "columns": [{"title": "layer", "number": True}, *({"title": t, "number": True} for t in COLUMNS.values())],
        "rows": [[_cell(row["layer"]), *(_cell(row[name]) for name in COLUMNS)] for row in rows],
    }


def _cell(value: Any) -> dict[str, Any]:
    if value is None:
        return {"text": "", "value": ""}
    if isinstance(value, bool):
        return {"text": "yes" if value else "", "value": int(value)}
    return {"text": f"{value:z.3f}".removesuffix(".000"), "value": value}


def _image(rows: Sequence[Row], *, width: int) -> str:
    """By layer: deviations, and what chance and other prompts make of them; as a data URI of an SVG."""
    points = [
        {"layer": row["layer"], "value": row[name], "answers": title}
        for row in rows
        for name, title in SERIES.items()
        if row[name] is not None
    ]
    noise = [{"layer": row["layer"], "low": -row["noise_floor"], "high": row["noise_floor"]} for row in rows]
    x = alt.X("layer:Q", title="layer (from 0)").axis(format="d", tickMinStep=1, grid=False)
    y = "deviation from the median layer"
    band = alt.Chart(alt.InlineData(values=noise)).mark_area(color=GRAY, opacity=0.25, interpolate="step")
    dots = alt.Chart(alt.InlineData(values=points)).mark_point(filled=True, size=40, opacity=1)
    titles = list(SERIES.values())
    legend = alt.Legend(title=None, orient="top", columns=1, labelColor=GRAY, labelLimit=width)
    chart: Any = (
        alt.layer(
            band.encode(x, alt.Y("low:Q", title=y), alt.Y2("high:Q")),
            dots.encode(
                x,
                alt.Y("value:Q", title=y, axis=alt.Axis(grid=False)),
                alt.Color("answers:N", scale=alt.Scale(domain=titles, range=[BLUE, AMBER, GRAY]), legend=legend),
                alt.Shape("answers:N", scale=alt.Scale(domain=titles), legend=legend),
            ),
        )
        .properties(width=width, height=220)
        .configure(background="transparent", padding=5)
        .configure_axis(labelColor=GRAY, titleColor=GRAY, domainColor=GRAY, tickColor=GRAY)
        .configure_view(stroke=None)
    )
    return as_image(chart)
