"""The score card, for the terminal."""

from __future__ import annotations

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.analysis.scorecard import RETENTION, SPEARMAN
from avss_dist.text import describe_threshold

GOOD = 0.7


def scorecard_tables(cards: pa.Table) -> RenderableType:
    """A table for each run, the score that orders its layers best first."""
    rows = cards.to_pylist()
    tables = []
    for run_id in dict.fromkeys(row["run_id"] for row in rows):
        mine = [row for row in rows if row["run_id"] == run_id]
        truths = [name for name, column in SPEARMAN.items() if any(row[column] is not None for row in mine)]
        shares = [share for share, column in RETENTION.items() if any(row[column] is not None for row in mine)]
        task = f" Kept: the perplexity of {mine[0]['task']} without those layers, under it." if shares else ""
        table = Table(
            title=Text(f"{mine[0]['model']}  ({run_id})"),
            caption=Text(f"Spearman's correlation of each score, over layers, with what leaving them out does.{task}"),
            title_style="bold",
            caption_justify="left",
        )
        table.add_column("score")
        for name in truths:
            table.add_column(f"with {name}", justify="right")
        for share in shares:
            table.add_column(f"kept without {share:.0%}", justify="right")
        for row in sorted(mine, key=lambda row: -_first(row, truths)):
            table.add_row(
                Text(_name(row)),
                *(_correlation(row[SPEARMAN[name]]) for name in truths),
                *("-" if row[RETENTION[share]] is None else f"{row[RETENTION[share]]:.1%}" for share in shares),
            )
        tables.append(table)
    return Group(*tables)


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
