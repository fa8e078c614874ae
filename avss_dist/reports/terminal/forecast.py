"""Table of what a command would do: evaluations, passes, tokens and time of each step."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from avss_dist.analysis.section import ReportColumn, ReportRow, ReportTable
from avss_dist.core.text import count_of, describe_count, describe_seconds
from avss_dist.reports.terminal.tables import FittedTable

if TYPE_CHECKING:
    from avss_dist.evaluation.forecast import Forecast

_COLUMNS = (
    ReportColumn("step", "step", number=False, wraps=True),
    ReportColumn("evaluations", "evaluations", describe_count),
    ReportColumn("stored", "stored", describe_count),
    ReportColumn("passes", "passes", describe_count, missing="?"),
    ReportColumn("tokens", "tokens", describe_count, missing="?", priority=1),
    ReportColumn("time", "seconds", describe_seconds, missing="?"),
)


def forecast_table(forecast: Forecast) -> RenderableType:
    """Return a table with a row for each step; below it memory, notes and the time of everything."""
    table = ReportTable(
        columns=_COLUMNS,
        rows=[ReportRow(asdict(step)) for step in forecast.steps],
        caption="Passes: forward passes of a batch that are missing, at most; a backward pass counts as two. "
        "Time: by the speed of stored losses of the model, or else of a run of a model of the same shape.",
    )
    parts: list[RenderableType] = [FittedTable(table)]
    if forecast.memory is not None:
        parts.append(Text(forecast.memory.describe()))
    for note in forecast.notes:
        parts.append(Text(note))
    parts.append(Text(_describe_work(forecast), style="bold"))
    return Group(*parts)


def _describe_work(forecast: Forecast) -> str:
    """Return the missing evaluations and their time in a sentence."""
    missing = sum(step.evaluations - step.stored for step in forecast.steps)
    if not missing:
        return "Nothing is left to measure."
    line = f"{count_of(missing, 'evaluation')} to measure"
    if forecast.seconds is None:
        return f"{line}; the time is not known."
    return f"{line}, about {describe_seconds(forecast.seconds)}."
