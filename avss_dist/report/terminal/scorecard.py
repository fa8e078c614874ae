"""The score card, for the terminal."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.scorecard import RETENTION, SPEARMAN
from avss_dist.report.terminal.tables import Column, FittedTable
from avss_dist.text import describe_threshold, printable

GOOD = 0.7


def scorecard_tables(cards: pa.Table) -> RenderableType:
    """A table for each run, the score that orders its layers best first."""
    rows = cards.to_pylist()
    run_ids = dict.fromkeys(row["run_id"] for row in rows)
    return Group(*(_table([row for row in rows if row["run_id"] == run_id]) for run_id in run_ids))


def _table(rows: list[dict[str, Any]]) -> FittedTable:
    truths = [name for name, column in SPEARMAN.items() if any(row[column] is not None for row in rows)]
    shares = [share for share, column in RETENTION.items() if any(row[column] is not None for row in rows)]
    task = f" Kept: the perplexity of {rows[0]['task']} without those layers, under it." if shares else ""
    rows = sorted(rows, key=lambda row: -_first(row, truths))
    return FittedTable(
        [
            Column(title="score", cells=[_name(row) for row in rows], number=False),
            *(
                Column(title=f"with {name}", cells=[_correlation(row[SPEARMAN[name]]) for row in rows], priority=i)
                for i, name in enumerate(truths)
            ),
            *(
                [Column(title="over sets", cells=[_correlation(row["spearman_sets"]) for row in rows], priority=2)]
                if any(row["spearman_sets"] is not None for row in rows)
                else []
            ),
            *(
                Column(title=title, cells=[_share(row[name]) for row in rows], priority=priority)
                for title, name, priority in _OF_LOSS
                if any(row[name] is not None for row in rows)
            ),
            *(
                Column(
                    title=f"kept without {share:.0%}", cells=[_share(row[RETENTION[share]]) for row in rows], priority=1
                )
                for share in shares
            ),
        ],
        title=f"{rows[0]['model']}  ({rows[0]['run_id']})",
        caption=Text(printable(f"{_caption(rows)}{task}")),
    )


_OF_LOSS = (("of the ceiling", "share_of_ceiling", 1), ("misranked", "misranked", 3))


def _caption(rows: list[dict[str, Any]]) -> str:
    text = "Spearman's correlation of each score, over layers, with what leaving them out does."
    if ceiling := next((row["ceiling"] for row in rows if row["ceiling"] is not None), None):
        text += f" Its ceiling, which the loss of other text of the same size would reach: {ceiling:.2f}. Misranked: "
        text += "pairs of layers in the wrong order."
    if any(row["spearman_sets"] is not None for row in rows):
        text += f" Over {rows[0]['sets']} sets: of the score's sum with what leaving the set out does."
    return text


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _first(row: dict[str, object], truths: list[str]) -> float:
    value = row[SPEARMAN[truths[0]]]
    return value if isinstance(value, float) else -2.0


def _correlation(value: float | None) -> Text:
    return Text("-" if value is None else f"{value:.2f}", style="bold" if value is not None and value > GOOD else "")


def _name(row: dict[str, object]) -> str:
    if row["score"] != "avss":
        return str(row["score"]).replace("_", " ")
    threshold, kind = row["threshold"], row["threshold_kind"]
    assert isinstance(threshold, float)
    return f"avss  {row['site']} / {row['recipe']} / {describe_threshold(threshold, str(kind))}"
