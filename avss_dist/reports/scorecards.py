"""Sections of the score card: correlation of each score with the effect of leaving layers out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pyarrow as pa

from avss_dist.analysis.scorecard import SPEARMAN, describe_score, is_published
from avss_dist.core.registry import MEASURED, ROUNDING_ESTIMATES
from avss_dist.pruning.selection import LAST
from avss_dist.reports.section import (
    AMBER,
    BLUE,
    GRAY,
    Chart,
    ReportColumn,
    ReportTable,
    Row,
    Section,
    decimals,
    page_number,
    percent,
)
from avss_dist.stats.rankings import spearman_interval

GOOD = 0.7  # a correlation that stands out
KINDS = {"from the scoring pass": BLUE, "from passes of avss ablate": AMBER, "a control": GRAY}
TRUTHS = {"loss": "the loss without each layer", "shapley": "the Shapley value", "taylor": "the first-order estimate"}


def scorecard_sections(cards: pa.Table) -> list[Section]:
    """Return the score card of each run, and that of each number format that its weights were rounded to.

    Args:
        cards: as `analysis.scorecard.score_cards` returns them.
    """
    rows = cards.to_pylist()
    sections = []
    for run_id, name in dict.fromkeys((row["run_id"], row["format"]) for row in rows):
        of_run = [row for row in rows if (row["run_id"], row["format"]) == (run_id, name)]
        change = f", weights rounded to {name}" if name else ""
        label = f"{of_run[0]['model']}  ({run_id}){change}"
        sections.append(Section(label=label, tables=[_table("scorecard", of_run)]))
    return sections


def page_section(label: str, cards: Sequence[Row], layers: int, readings: int) -> Section | None:
    """Return the score card of one run with a chart and a sentence, or None if no score has a correlation.

    Args:
        layers: number of layers.
        readings: number of the readings of AVSS, of which ``cards`` has the best.
    """
    truth = next((name for name in TRUTHS if any(row[SPEARMAN[name]] is not None for row in cards)), "")
    column = SPEARMAN.get(truth, "")
    compared = [row for row in cards if row["score"] != truth and row.get(column) is not None]
    if not compared:
        return None
    compared.sort(key=lambda row: -float(row[column]))
    name, best = f"scorecard-{page_number(label)}", compared[0]
    text = f"Closest to {TRUTHS[truth]}: {_name(best)}, {best[column]:z.2f}"
    if best["ceiling"] is not None:
        text += f" of at most {best['ceiling']:z.2f}, which the same measurement on other text would reach"
    for row in compared:
        if is_published(row):
            text += f". AVSS as published: {row[column]:z.2f}"
        elif row["score"] == LAST:
            text += f". The place alone: {row[column]:z.2f}"
    kinds = list(KINDS)
    drawn = [
        {
            "score": _name(row),
            "kind": kinds[2 if row["score"] == LAST else 1 if row["score"] in MEASURED else 0],
            "correlation": row[column],
            "ceiling": row["ceiling"],
            **dict(zip(("low", "high"), spearman_interval(row[column], layers), strict=True)),
        }
        for row in compared
    ]
    chart = Chart(
        name=name,
        title=f"Correlation with {TRUTHS[truth]}",
        meaning="The correlation of each score with what leaving layers out does, and its 95% interval.",
        rows=drawn,
        draw=partial(_drawing, min(0.0, *(row["correlation"] for row in drawn)), len(drawn)),
    )
    readings_note = f"Of {readings} readings of AVSS, the best of each site is shown; on other text, expect less of it."
    return Section(label=label, sentences=[f"{text}. {readings_note}"], charts=[chart], tables=[_table(name, cards)])


def _table(name: str, rows: Sequence[Row]) -> ReportTable:
    columns: list[tuple[str, str, Callable[[float], str], int]] = [
        *((f"with {truth}", column, decimals(2), i) for i, (truth, column) in enumerate(SPEARMAN.items())),
        ("of the ceiling", "share_of_ceiling", percent(1), 1),
        ("misranked", "misranked", percent(1), 3),
    ]
    known = [column for column in columns if any(row[column[1]] is not None for row in rows)]
    if known:
        rows = sorted(rows, key=lambda row: -2.0 if row[known[0][1]] is None else row[known[0][1]], reverse=True)
    rounded_to = rows[0]["format"]
    change = f"rounding their weights to {rounded_to}" if rounded_to else "leaving them out"
    caption = f"Spearman's correlation of each score, over layers, with what {change} does."
    if ceiling := next((row["ceiling"] for row in rows if row["ceiling"] is not None), None):
        caption += f" Its ceiling, which the loss of other text of the same size would reach: {ceiling:z.2f}. "
        caption += "Misranked: pairs of layers in the wrong order."
    estimates = {row["same_text"] for row in rows if row["score"] in ROUNDING_ESTIMATES}
    if True in estimates:
        caption += " Estimates are of the same text, and share the chance of its selection: expect less of them "
        caption += "elsewhere."
    elif estimates:
        caption += " Estimates are of other text than that."
    return ReportTable(
        name=name,
        title="Each score",
        columns=[
            ReportColumn("score", [describe_score(row) for row in rows], number=False),
            *(
                ReportColumn(
                    heading,
                    [row[column] for row in rows],
                    format_,
                    priority=priority,
                    style=(lambda rho: "bold" if rho is not None and rho > GOOD else "")
                    if column.startswith("spearman")
                    else None,
                )
                for heading, column, format_, priority in known
            ),
        ],
        caption=caption,
    )


def _name(card: Row) -> str:
    return "AVSS as published" if is_published(card) else describe_score(card).replace("avss  ", "AVSS ")


def _drawing(lowest: float, number: int) -> Any:
    """Return the chart of the correlation of each score with its interval, and a dashed line at the ceiling."""
    import altair as alt

    legend = alt.Legend(title=None, orient="top", columns=1, symbolType="circle", symbolOpacity=1)
    base = alt.Chart().encode(
        alt.Y("score:N", sort=None, title=None).axis(labelLimit=alt.ExprRef("room")),
        alt.Color("kind:N", scale=alt.Scale(domain=list(KINDS), range=list(KINDS.values())), legend=legend),
    )
    scale = alt.Scale(domain=[lowest, 1])
    x = alt.X("correlation:Q", scale=scale, title="rank correlation", axis=alt.Axis(grid=False, tickCount=5))
    tooltip = ["score:N", alt.Tooltip("correlation:Q", format=".2f")]
    return alt.layer(
        alt.Chart().mark_rule(color=GRAY, opacity=0.5).encode(x=alt.datum(0)),
        alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(alt.X("ceiling:Q", aggregate="max")),
        base.mark_rule(clip=True).encode(alt.X("low:Q", scale=scale), alt.X2("high:Q")),
        base.mark_point(filled=True, size=45, opacity=1).encode(x, tooltip=tooltip),
    ).properties(height=18 * number)
