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
        name: what its files are called.
        title: it stands above the chart.
        meaning: what is drawn, in a sentence.
        rows: the data.
        draw: makes the `altair` chart of the data set ``rows``. It is called for the page alone, since `altair` takes
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
        label: the run.
        about: what was measured, in a line.
        sentences: what the numbers say.
        charts: of the numbers in the tables.
        tables: all numbers.
    """

    label: str
    about: str = ""
    sentences: Sequence[str] = ()
    charts: Sequence[Chart] = ()
    tables: Sequence[ReportTable] = ()


def page_number(label: str) -> str:
    """Return the number that the label of a run begins with on the page: of ``1. alpha``, ``1``."""
    return label.partition(".")[0]


def interval_ends(interval: Interval | None) -> dict[str, float | None]:
    """Return the columns ``low`` and ``high`` of a chart's row."""
    low, high = interval or (None, None)
    return {"low": low, "high": high}
