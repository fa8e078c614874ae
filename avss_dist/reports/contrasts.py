"""Sections on contrasts of hallucinated and truthful answers: each layer with controls, and predictions by layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from avss_dist.analysis.contrast import FEATURES, LEVEL, Contrast
from avss_dist.reports.section import (
    AMBER,
    BLUE,
    GRAY,
    BarColumn,
    Chart,
    ReportColumn,
    ReportTable,
    Row,
    Section,
    decimals,
    interval,
    known_interval,
    p_value,
    page_number,
    percent,
    yes,
)
from avss_dist.stats.intervals import MINIMUM_UNITS

SERIES = {
    "deviation": "after their own prompts",
    "length_matched": "pairs of about equal length",
    "after_another": "after another prompt",
}
"""Columns that the chart draws, each with a description of its answers."""


def contrast_section(label: str, result: Contrast) -> Section:
    """Return the contrast of one run."""
    name, reading, rows = f"contrast-{page_number(label)}", result.reading, result.layers.to_pylist()
    about = f"{reading['hallucinated']} against {reading['truthful']} answers"
    about += f", {reading['pairs']} pairs" if reading["pairs"] else ""
    drawn = [
        {"layer": row["layer"], "answers": title, "deviation": row[source], "noise": row["noise_floor"]}
        for row in rows
        for source, title in SERIES.items()
        if row[source] is not None
    ]
    chart = Chart(
        name=name,
        title="Deviation from the median layer",
        meaning="How far each layer's contrast is from that of the median layer, beside the controls.",
        rows=drawn,
        draw=_drawing,
    )
    predictions = [_predictions_table(name, result.predictions.to_pylist())] if len(result.predictions) else []
    return Section(
        label=label,
        about=f"{about}; {reading['site']}, {reading['recipe']}, below {reading['threshold']}.",
        sentences=result.findings,
        charts=[chart],
        tables=[_layers_table(name, rows, reading), *predictions],
    )


def _layers_table(name: str, rows: Sequence[Row], reading: Mapping[str, Any]) -> ReportTable:
    def column(heading: str, source: str, format_: Callable[[Any], str], priority: int = 0) -> ReportColumn:
        return ReportColumn(heading, [row[source] for row in rows], format_, priority=priority)

    number = decimals(3)
    intervals = [known_interval(row["eavss_contrast_low"], row["eavss_contrast_high"]) for row in rows]
    sizes = [abs(row["deviation"] or 0.0) for row in rows]
    beyond_noise = [
        (row["p_holm"] or 1) < LEVEL and size > (row["noise_floor"] or 0.0)
        for row, size in zip(rows, sizes, strict=True)
    ]
    pairs, truthful = reading["pairs"], reading["truthful"]
    matched = f", the {rows[0]['length_matched_pairs']} pairs of about equal length" if pairs else ""
    caption = (
        f"Contrast: log(AVSS on {reading['hallucinated']} / on {truthful} answers). The tests are of its deviation "
        f"from the median layer: p by exchange of labels inside {'pairs' if pairs else 'shards'} (Holm), noise "
        f"between random halves of {truthful} answers{matched}, and the same answers after another prompt."
    )
    if rows[0]["eavss_contrast_low"] is None:
        units = "pairs" if pairs else "shards"
        caption += f" No interval: fewer than {MINIMUM_UNITS} {units}, or a contrast that is not defined."
    return ReportTable(
        name=name,
        title="Each layer",
        columns=[
            column("layer", "layer", str),
            column("contrast", "eavss_contrast", number),
            ReportColumn("95%", intervals, interval(number), priority=2),
            column("rank", "rank", decimals(0), 3),
            column("in top 25%", "prone_probability", percent(0), 4),
            column("deviation", "deviation", number),
            BarColumn(values=sizes, marked=beyond_noise),
            column("p", "p_holm", p_value),
            column("noise", "noise_floor", number, 1),
            column("length-matched", "length_matched", number, 1),
            column("its p", "length_matched_p", p_value, 1),
            column("other prompt", "after_another", number, 1),
            ReportColumn("left", [bool(row["stands"]) for row in rows], yes),
        ],
        caption=caption,
    )


def _predictions_table(name: str, rows: Sequence[Row]) -> ReportTable:
    """Return the baselines, and the best layer of each statistic."""
    best = {str(row["statistic"]).replace("_", "-"): row for row in rows if row["layer"] is None}
    for statistic, title in FEATURES.items():
        of_layers = [row for row in rows if row["statistic"] == statistic and row["layer"] is not None]
        if row := max(of_layers, key=lambda row: row["auroc"], default=None):
            best[f"{title}, layer {row['layer']}"] = row
    intervals = [known_interval(row["auroc_low"], row["auroc_high"]) for row in best.values()]
    return ReportTable(
        name=f"{name}-predictions",
        title="Does it predict",
        columns=[
            ReportColumn("predicts by", list(best), number=False),
            ReportColumn("AUROC", [row["auroc"] for row in best.values()], decimals(3)),
            ReportColumn("95%", intervals, interval(decimals(3))),
            ReportColumn("other prompt", [row["after_another"] for row in best.values()], decimals(3), priority=1),
            ReportColumn("beats", [bool(row["beats_baselines"]) for row in best.values()], yes),
        ],
        caption="Folds over prompts; of each statistic, its best layer.",
    )


def _drawing() -> Any:
    """Return the chart of deviations: a dot for each layer and kind of answers, and a band of noise."""
    import altair as alt

    titles = list(SERIES.values())
    legend = alt.Legend(title=None, orient="top", columns=1, labelLimit=alt.ExprRef("limit"), symbolOpacity=1)
    title = "deviation from the median layer"
    base = alt.Chart().encode(alt.X("layer:Q", title="layer (from 0)").axis(format="d", tickMinStep=1, grid=False))
    band = (
        base.transform_calculate(low="-datum.noise", high="datum.noise")
        .mark_area(color=GRAY, opacity=0.25, interpolate="step")
        .encode(alt.Y("low:Q", title=title), alt.Y2("high:Q"))
        .transform_filter(f"datum.answers == '{titles[0]}'")
    )
    dots = base.mark_point(filled=True, size=40, opacity=1).encode(
        alt.Y("deviation:Q", title=title, axis=alt.Axis(grid=False)),
        alt.Color("answers:N", scale=alt.Scale(domain=titles, range=[BLUE, AMBER, GRAY]), legend=legend),
        alt.Shape("answers:N", scale=alt.Scale(domain=titles), legend=legend),
        tooltip=["layer:Q", "answers:N", alt.Tooltip("deviation:Q", format=".3f")],
    )
    return alt.layer(band, dots).properties(height=220)
