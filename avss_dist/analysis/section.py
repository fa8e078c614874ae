"""Sections of a report: sentences, tables and charts, described once for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

from avss_dist.core.text import printable

GRAY, BLUE, AMBER, VIOLET = "#8b949e", "#4c9be8", "#e0a030", "#b07cd8"  # seen on light and on dark
Row = Mapping[str, Any]  # of a table
Interval = tuple[float, float]


def interval(ends: Callable[[float], str]) -> Callable[[Interval], str]:
    """Return a format of intervals, given that of their ends."""
    return lambda value: f"{ends(value[0])} to {ends(value[1])}"


def p_value(value: float) -> str:
    """Format a p-value: ``0.012``, or ``<0.001``."""
    return f"{value:z.3f}" if value >= 0.001 else "<0.001"


def yes(value: bool) -> str:
    """Format a boolean: ``yes``, or nothing."""
    return "yes" if value else ""


def known_interval(low: float | None, high: float | None) -> Interval | None:
    """Return an interval, or None if one of its ends is missing or not finite."""
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return None
    return low, high


@dataclass(frozen=True, eq=False)
class ReportColumn:
    """A column of a table.

    Attributes:
        heading: its name.
        values: a value for each row; None and NaN are missing. A pair of numbers is an interval.
        format: returns the text of a value that is not missing.
        missing: the text of a missing value in a terminal; a page has its own.
        group: common name of neighbouring columns, such as a task; it precedes the heading.
        meaning: description of the values, in a few words.
        number: true for numbers, which are aligned to the right and sorted as numbers.
        priority: 0 is always shown; of the others, a narrow terminal leaves out the highest number first.
        wraps: true for prose, which may be broken into lines.
        style: returns the style of a value in a terminal, as a name of rich.
        name: class of its cells on the page, for a column with its own appearance.
    """

    heading: str
    values: Sequence[Any]
    format: Callable[[Any], str] = str
    _: KW_ONLY
    missing: str = "-"
    group: str = ""
    meaning: str = ""
    number: bool = True
    priority: int = 0
    wraps: bool = False
    style: Callable[[Any], str] | None = None
    name: str = ""

    def is_missing(self, row: int) -> bool:
        """Whether a row has no value."""
        value = self.values[row]
        return value is None or (isinstance(value, float) and math.isnan(value))

    def text(self, row: int) -> str:
        """Return the printable text of a row's value. Empty if it is missing."""
        return "" if self.is_missing(row) else printable(self.format(self.values[row]))

    def sort_key(self, row: int) -> Any:
        """Return the sort key of a row: its value, or the lower end of an interval. Empty if it is missing."""
        value = self.values[row]
        if self.is_missing(row) or (isinstance(value, tuple) and not self.number):
            return self.text(row)
        if isinstance(value, tuple):
            return value[0]
        return int(value) if isinstance(value, bool) else value

    def is_interval(self, row: int) -> bool:
        """Whether a row's value is an interval."""
        return self.number and isinstance(self.values[row], tuple)

    def whole(self, row: int) -> str:
        """Return a row's value if it is text, which the format may shorten, and otherwise its formatted text."""
        value = self.values[row]
        return printable(value) if isinstance(value, str) else self.text(row)


@dataclass(frozen=True, kw_only=True, eq=False)
class BarColumn:
    """A column of bars, which a terminal draws. The page has charts instead.

    Attributes:
        values: a length for each row.
        largest: the length that fills the column; by default the largest value.
        marked: true for bars that are red; by default none.
        width: width of the column, in cells of the terminal.
        priority: as in `ReportColumn`.
    """

    values: Sequence[float | None]
    largest: float | None = None
    marked: Sequence[bool] = ()
    width: int = 18
    priority: int = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportTable:
    """A table, of any number of rows.

    Attributes:
        name: base name of its CSV file.
        title: title that says what a row is; may be empty.
        columns: columns, of which the first one names the rows.
        caption: explanation below the table.
        marked: true for rows that stand out; by default none.
        mark: kind of the marked rows: ``lowest`` or ``failed``.
    """

    columns: Sequence[ReportColumn | BarColumn]
    name: str = ""
    title: str = ""
    caption: str = ""
    marked: Sequence[bool] = ()
    mark: str = "lowest"

    @property
    def values(self) -> list[ReportColumn]:
        """Columns except bars."""
        return [column for column in self.columns if isinstance(column, ReportColumn)]

    @property
    def rows(self) -> range:
        """Positions of the rows."""
        return range(len(self.columns[0].values))

    @property
    def meanings(self) -> str:
        """Sentences that explain the columns, one for each column with a meaning."""
        return " ".join(f"{column.heading}: {column.meaning}." for column in self.values if column.meaning)

    def is_marked(self, row: int) -> bool:
        """Whether a row stands out."""
        return bool(self.marked) and self.marked[row]


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
    rows: Sequence[Mapping[str, Any]]
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


def column_of(
    rows: Sequence[Row], heading: str, name: str, format: Callable[[Any], str] = str, priority: int = 0
) -> ReportColumn:
    """Return the column of a field of rows, such as those of a table of the warehouse."""
    return ReportColumn(heading, [row[name] for row in rows], format, priority=priority)


def page_number(label: str) -> str:
    """Return the number at the start of a run's label on the page, such as ``1`` of ``1. alpha``."""
    return label.partition(".")[0]
