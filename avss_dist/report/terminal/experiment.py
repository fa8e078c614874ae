"""An experiment's table and verdict, for the terminal and for papers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.analysis.verdict import WHOLE, primary_metric, shown_value, verdicts
from avss_dist.settings import LOSS

Row = Mapping[str, Any]  # of the table `experiments`


def experiment_tables(rows: Sequence[Row]) -> RenderableType:
    """For each run and share, a line for each method and a column for each task; below, what it says in words."""
    parts: list[RenderableType] = []
    for run_id in dict.fromkeys(row["run_id"] for row in rows):
        of_run = [row for row in rows if row["run_id"] == run_id]
        for share in dict.fromkeys(row["share"] for row in of_run if row["share"]):
            parts.append(_table(of_run, share))
        parts += [Text(text) for text in verdicts(of_run)]
        parts.append(Text())
    return Group(*parts)


def _table(rows: Sequence[Row], share: float) -> Table:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    speaks = {task: primary_metric([row for row in rows if row["task"] == task]) for task in tasks}
    shown = [row for row in rows if row["share"] in (0.0, share) and row["metric"] == speaks[row["task"]]]
    table = Table(
        title=Text(f"{rows[0]['model']} without {share:.0%} of its layers  ({rows[0]['run_id']})"),
        title_style="bold",
        caption="Retention over that of the whole model (of a perplexity: under it), and its 95% interval.",
        caption_justify="left",
    )
    table.add_column("layers chosen by")
    table.add_column("dropped", overflow="fold", max_width=28)
    for task in tasks:
        table.add_column(Text(f"{task}\n{'perplexity' if speaks[task] == LOSS else speaks[task]}"), justify="right")
        table.add_column("kept", justify="right")
    for method in dict.fromkeys(row["method"] for row in shown):
        of = {row["task"]: row for row in shown if row["method"] == method}
        first = next(iter(of.values()))
        cells = [cell for task in tasks for cell in _cells(of.get(task))]
        table.add_row(Text(method), ", ".join(map(str, first["drop"])) or "-", *cells)
    return table


def _cells(row: Row | None) -> Iterator[str]:
    if row is None:
        yield from ("-", "-")
        return
    yield shown_value(row)
    low, high = row.get("retention_low"), row.get("retention_high")
    known = low is not None and high is not None and isfinite(low)
    interval = f" [{low:.1%}, {high:.1%}]" if known else ""
    yield "" if row["method"] == WHOLE else f"{row['retention']:.1%}{interval}"
