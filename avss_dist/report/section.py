"""One subject of a report about one run: sentences, tables and charts, described once for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from avss_dist.report.table import Interval, ReportTable

GRAY, BLUE, AMBER = "#8b949e", "#4c9be8", "#e0a030"  # seen on light and on dark
Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chart:
    """A chart of a section.

    Attributes:
        name: base name of its files.
        title: title above the chart.
        meaning: description of the chart, in a sentence.
        rows: the data.
        draw: returns the `altair` chart of the data set ``rows``. It is called for the page alone, since `altair` takes
            a second to import.
    """

    name: str
    title: str
    meaning: str
    rows: Rows
    draw: Callable[[], Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class Section:
    """One subject of a report about one run. A terminal shows all of it but the charts.

    Attributes:
        label: name of the run.
        about: summary of the measurement, in a line.
        sentences: conclusions from the numbers.
        charts: charts of the numbers in the tables.
        tables: all numbers.
    """

    label: str
    about: str = ""
    sentences: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[ReportTable] = ()


def page_number(label: str) -> str:
    """Return the number at the start of a run's label on the page, such as ``1`` of ``1. alpha``."""
    return label.partition(".")[0]


def interval_ends(interval: Interval | None) -> dict[str, float | None]:
    """Return the columns ``low`` and ``high`` of a chart's row."""
    low, high = interval or (None, None)
    return {"low": low, "high": high}
