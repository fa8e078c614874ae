"""An experiment's table and verdict, for the terminal and for papers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.sparsity_curves import is_sparse, sparsity_curves
from avss_dist.analysis.verdict import (
    WHOLE,
    lacks_interval,
    primary_metric,
    shown_interval,
    shown_method,
    shown_value,
    verdicts,
)
from avss_dist.names import LOSS, PERPLEXITY
from avss_dist.report.terminal.sparsity import curves_table
from avss_dist.report.terminal.tables import Column, FittedTable
from avss_dist.stats.retention import NO_INTERVAL
from avss_dist.text import basename

CAPTION = "Retention over that of the whole model (of a perplexity: under it), and its 95% interval."
Row = Mapping[str, Any]  # of the table `experiments`


def experiment_tables(rows: Sequence[Row]) -> RenderableType:
    """For each run and share, a line for each method and a column for each task; below, what it says in words.

    After them, the sparsities of each run.
    """
    parts: list[RenderableType] = []
    for run_id in dict.fromkeys(row["run_id"] for row in rows):
        every = [row for row in rows if row["run_id"] == run_id]
        of_run = [row for row in every if not is_sparse(row)]
        for share in dict.fromkeys(row["share"] for row in of_run if row["share"]):
            parts.append(_table(of_run, share))
        parts += [Text(text) for text in verdicts(of_run)]
        if curves := sparsity_curves(every):
            parts.append(curves_table(curves))
        parts.append(Text())
    return Group(*parts)


def _table(rows: Sequence[Row], share: float) -> FittedTable:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    speaks = {task: primary_metric([row for row in rows if row["task"] == task]) for task in tasks}
    by_method: dict[str, dict[str, Row]] = {}
    shown = [row for row in rows if row["share"] in (0.0, share) and row["metric"] == speaks[row["task"]]]
    for row in shown:
        by_method.setdefault(shown_method(row), {})[row["task"]] = row
    return FittedTable(
        [
            Column(title="layers chosen by", cells=list(by_method), number=False),
            Column(title="dropped", cells=_dropped(by_method.values()), number=False, wraps=True, priority=2),
            *(column for task in tasks for column in _of_task(task, speaks[task], by_method.values())),
        ],
        title=f"{rows[0]['model']} without {share:.0%} of its layers  ({rows[0]['run_id']})",
        caption=Text(f"{CAPTION} {NO_INTERVAL}" if lacks_interval(shown) else CAPTION),
    )


def _dropped(methods: Iterable[Mapping[str, Row]]) -> list[str]:
    drops = (next(iter(of.values()))["drop"] for of in methods)
    return [", ".join(map(str, drop)) or "-" for drop in drops]


def _of_task(task: str, metric: str, methods: Iterable[Mapping[str, Row]]) -> Iterator[Column]:
    values, kept = zip(*(_cells(of.get(task)) for of in methods), strict=True)
    yield Column(title=f"{task}\n{'perplexity' if metric == LOSS else metric}", cells=values, priority=1)
    yield Column(title=f"{basename(task.removeprefix(PERPLEXITY))}\nkept", cells=kept)


def _cells(row: Row | None) -> tuple[str, str]:
    """The metric, and what is kept of it."""
    if row is None:
        return "-", "-"
    return shown_value(row), "" if row["method"] == WHOLE else f"{row['retention']:.1%}{shown_interval(row)}"
