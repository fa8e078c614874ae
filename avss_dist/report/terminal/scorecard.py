"""The score card, for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.reliability import FEWEST_SETS
from avss_dist.analysis.scorecard import RETENTION, SPEARMAN, describe_score
from avss_dist.report.terminal.tables import Column, FittedTable
from avss_dist.text import printable

GOOD = 0.7


def scorecard_tables(cards: pa.Table) -> RenderableType:
    """A table for each run, the score that orders its layers best first."""
    rows = cards.to_pylist()
    run_ids = dict.fromkeys(row["run_id"] for row in rows)
    return Group(*(_table([row for row in rows if row["run_id"] == run_id]) for run_id in run_ids))


def _table(rows: list[dict[str, Any]]) -> FittedTable:
    shown = [column for column in _columns() if any(row[column.name] is not None for row in rows)]
    if shown:
        rows = sorted(rows, key=lambda row: -_known(row[shown[0].name]))
    return FittedTable(
        [
            Column(title="score", cells=[describe_score(row) for row in rows], number=False),
            *(
                Column(title=one.title, cells=[one.cell(row[one.name]) for row in rows], priority=one.priority)
                for one in shown
            ),
        ],
        title=f"{rows[0]['model']}  ({rows[0]['run_id']})",
        caption=Text(printable(_caption(rows))),
    )


@dataclass(frozen=True)
class _Shown:
    """A column of the card, and how it is shown."""

    title: str
    name: str
    cell: Callable[[float | None], Text | str]
    priority: int


def _columns() -> list[_Shown]:
    return [
        *(_Shown(f"with {name}", column, _correlation, i) for i, (name, column) in enumerate(SPEARMAN.items())),
        _Shown("of the ceiling", "share_of_ceiling", _share, 1),
        _Shown("misranked", "misranked", _share, 3),
        _Shown("over sets", "spearman_sets", _correlation, 2),
        *(_Shown(f"kept without {share:.0%}", column, _share, 1) for share, column in RETENTION.items()),
    ]


def _caption(rows: list[dict[str, Any]]) -> str:
    text = "Spearman's correlation of each score, over layers, with what leaving them out does."
    if ceiling := next((row["ceiling"] for row in rows if row["ceiling"] is not None), None):
        text += f" Its ceiling, which the loss of other text of the same size would reach: {ceiling:z.2f}. Misranked: "
        text += "pairs of layers in the wrong order."
    if any(row["spearman_sets"] is not None for row in rows):
        text += f" Over {rows[0]['sets']} sets: of the score's sum with what leaving the set out does."
    elif rows[0]["sets"]:
        text += f" A correlation over sets of several layers takes {FEWEST_SETS} of them; {rows[0]['sets']} "
        text += f"{'is' if rows[0]['sets'] == 1 else 'are'} evaluated."
    if any(row[column] is not None for row in rows for column in RETENTION.values()):
        text += f" Kept: the perplexity of {rows[0]['task']} without those layers, under it."
    return text


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:z.1%}"


def _known(value: float | None) -> float:
    return -2.0 if value is None else value


def _correlation(value: float | None) -> Text:
    return Text("-" if value is None else f"{value:z.2f}", style="bold" if value is not None and value > GOOD else "")
