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
                Column(
                    title=f"kept without {share:.0%}", cells=[_kept(row[RETENTION[share]]) for row in rows], priority=1
                )
                for share in shares
            ),
        ],
        title=f"{rows[0]['model']}  ({rows[0]['run_id']})",
        caption=Text(
            printable(f"Spearman's correlation of each score, over layers, with what leaving them out does.{task}")
        ),
    )


def _kept(value: float | None) -> str:
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
