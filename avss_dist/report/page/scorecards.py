"""The page's section on the score card: how well each score orders layers as the ground truth does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import altair as alt
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.scorecard import RETENTION, SPEARMAN, best_readings, describe_score, is_published, score_cards
from avss_dist.pruning.selection import LAST
from avss_dist.registry import GROUND_TRUTH, MEASURED, SCORES
from avss_dist.report.page.experiments import AMBER, BLUE, GRAY, as_image
from avss_dist.stats.rankings import spearman_interval

if TYPE_CHECKING:
    from avss_dist.warehouse.reader import Warehouse

MOST = 6  # runs
KINDS = {"from the scoring pass": BLUE, "from passes of avss ablate": AMBER, "a control": GRAY}
TRUTHS = {"loss": "the loss without each layer", "shapley": "the Shapley value", "taylor": "the first-order estimate"}
OTHERS = {"share_of_ceiling": "of the ceiling", "misranked": "misranked", "spearman_sets": "over sets"}
Row = Mapping[str, Any]  # of the table `runs`, or of a card


def scorecards(warehouse: Warehouse, runs: Sequence[Row], labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """For the template: one entry for each of the first runs whose ground truth is known.

    Args:
        runs: rows of ``runs``.
        labels: by run id.
    """
    known = _with_truth(warehouse, runs)[:MOST]
    every = score_cards(warehouse, known)
    best = best_readings(every).to_pylist()
    readings = {run["run_id"]: 0 for run in known}
    for row in every.to_pylist():
        readings[row["run_id"]] += row["score"] == "avss"
    by_run = {run["run_id"]: [row for row in best if row["run_id"] == run["run_id"]] for run in known}
    return [
        _entry(labels[run["run_id"]], cards, truth, run["num_layers"], readings[run["run_id"]])
        for run in known
        if (cards := by_run[run["run_id"]]) and (truth := _truth_of(cards))
    ]


def _with_truth(warehouse: Warehouse, runs: Sequence[Row]) -> list[Row]:
    """Runs whose checkpoint has an evaluation of its layers."""
    revisions = pa.array(sorted({run["revision"] for run in runs} - {None}), pa.string())
    rows = warehouse.table("evaluations", where=pc.field("revision").isin(revisions), columns=["revision", "task"])
    tasks = tuple(SCORES[name].task for name in GROUND_TRUTH)
    found = {row["revision"] for row in rows.to_pylist() if row["task"].startswith(tasks)}
    return [run for run in runs if run["revision"] in found]


def _truth_of(cards: Sequence[Row]) -> str | None:
    """The first truth that scores are compared with."""
    return next((name for name in TRUTHS if any(row[SPEARMAN[name]] is not None for row in cards)), None)


def _entry(label: str, cards: Sequence[Row], truth: str, layers: int, readings: int) -> dict[str, Any]:
    column = SPEARMAN[truth]
    others = [row for row in cards if row["score"] != truth and row[column] is not None]
    others.sort(key=lambda row: -float(row[column]))
    shown = [name for name in (column, *OTHERS, *RETENTION.values()) if any(row[name] is not None for row in others)]
    titles = {
        column: "correlation",
        **OTHERS,
        **{name: f"kept without {share:.0%}" for share, name in RETENTION.items()},
    }
    return {
        "name": "scorecard-" + label.partition(".")[0],
        "label": label,
        "text": _text(others, column, truth, readings),
        "wide": _image(others, column, layers, width=640, labels=260),
        "narrow": _image(others, column, layers, width=145, labels=150),
        "columns": [{"title": "score", "number": False}, *({"title": titles[name], "number": True} for name in shown)],
        "rows": [[_cell(_name(row)), *(_cell(row[name], name) for name in shown)] for row in others],
    }


def _text(cards: Sequence[Row], column: str, truth: str, readings: int) -> str:
    best = cards[0]
    text = f"Closest to {TRUTHS[truth]}: {_name(best)}, {_two(best[column])}"
    if best["ceiling"] is not None:
        text += f" of at most {_two(best['ceiling'])}, which the same measurement on other text would reach"
    for row in cards:
        if is_published(row):
            text += f". AVSS as published: {_two(row[column])}"
        elif row["score"] == LAST:
            text += f". The place alone: {_two(row[column])}"
    return f"{text}. Of {readings} readings of AVSS, the best of each site is shown; on other text, expect less of it."


def _two(value: float) -> str:
    """With two digits after the point; there is no minus before a zero."""
    return f"{round(value, 2) + 0:.2f}"


def _name(card: Row) -> str:
    return "AVSS as published" if is_published(card) else describe_score(card).replace("avss  ", "AVSS ")


def _cell(value: Any, column: str = "") -> dict[str, Any]:
    if value is None:
        return {"text": "", "value": ""}
    if isinstance(value, str):
        return {"text": value, "value": value}
    return {"text": _two(value) if column.startswith("spearman") else f"{value:z.1%}", "value": value}


def _kind(card: Row) -> str:
    place = 2 if card["score"] == LAST else 1 if card["score"] in MEASURED else 0
    return list(KINDS)[place]


def _image(cards: Sequence[Row], column: str, layers: int, *, width: int, labels: int) -> str:
    """A dot and its interval for each score, and the ceiling, as a data URI of an SVG."""
    points = []
    for row in cards:
        low, high = spearman_interval(row[column], layers)
        of = {"score": _name(row), "kind": _kind(row), "rho": row[column], "ceiling": row["ceiling"]}
        points.append(of | ({"low": low, "high": high} if isfinite(low) else {}))
    base = alt.Chart().encode(
        alt.Y("score:N", sort=None, title=None),
        alt.Color(
            "kind:N",
            scale=alt.Scale(domain=list(KINDS), range=list(KINDS.values())),
            legend=alt.Legend(title=None, orient="top", columns=1, labelColor=GRAY, symbolType="circle"),
        ),
    )
    scale = alt.Scale(domain=[min([0, *(point["rho"] for point in points)]), 1])
    x = alt.X("rho:Q", scale=scale, title="rank correlation", axis=alt.Axis(grid=False, tickCount=5))
    interval = base.mark_rule(clip=True).encode(alt.X("low:Q", scale=scale), alt.X2("high:Q"))
    ceiling = alt.Chart().mark_rule(color=GRAY, strokeDash=[4, 3]).encode(alt.X("ceiling:Q", aggregate="max"))
    zero = alt.Chart().mark_rule(color=GRAY, opacity=0.5).encode(x=alt.datum(0))
    dots = base.mark_point(filled=True, size=45, opacity=1).encode(x)
    chart: Any = (
        alt.layer(zero, ceiling, interval, dots, data=alt.InlineData(values=points))
        .properties(width=width, height=alt.Step(18))
        .configure(background="transparent", padding={"left": 30, "right": 5, "top": 5, "bottom": 5})
        .configure_axis(labelColor=GRAY, titleColor=GRAY, domainColor=GRAY, tickColor=GRAY, labelLimit=labels)
        .configure_view(stroke=None)
    )
    return as_image(chart)
