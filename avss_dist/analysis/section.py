"""Sections of a report: sentences, tables and charts, described once for the terminal and the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

from avss_dist.core.text import printable
from avss_dist.core.values import TableRow

if TYPE_CHECKING:
    from altair.typing import ChartType

# Colors that are seen on a light page and on a dark one.
GRAY = "#8b949e"
BLUE = "#4c9be8"
AMBER = "#e0a030"
VIOLET = "#b07cd8"

Interval = tuple[float, float]


def interval(ends: Callable[[float], str], separator: str = " to ") -> Callable[[Interval], str]:
    """Return a format of intervals, given that of their ends."""

    def describe(value: Interval) -> str:
        low, high = value
        return f"{ends(low)}{separator}{ends(high)}"

    return describe


def p_value(value: float) -> str:
    """Format a p-value: ``0.012``, or ``<0.001``."""
    return f"{value:z.3f}" if value >= 0.001 else "<0.001"


def yes(value: bool) -> str:
    """Format a boolean: ``yes``, or nothing."""
    return "yes" if value else ""


def known_interval(low: float | None, high: float | None) -> Interval | None:
    """Return an interval, or None if one of its ends is missing or not finite."""
    if low is None or high is None:
        return None
    if math.isfinite(low) and math.isfinite(high):
        return low, high
    return None


@dataclass(frozen=True, eq=False)
class ReportColumn:
    """A column of a table: the heading, and the look of the values that each row has under its key.

    Attributes:
        heading: its name.
        key: key of its value in a row. None and NaN are missing. A pair of numbers is an interval.
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
    key: str
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

    def is_missing(self, value: object) -> bool:
        """Whether a value is missing."""
        return value is None or (isinstance(value, float) and math.isnan(value))

    def is_interval(self, value: object) -> bool:
        """Whether a value is an interval."""
        return self.number and isinstance(value, tuple)

    def text(self, value: object) -> str:
        """Return the printable text of a value. Empty if it is missing."""
        if self.is_missing(value):
            return ""
        return printable(self.format(value))

    def full_text(self, value: object) -> str:
        """Return a value if it is text, which the format may shorten, and otherwise its formatted text."""
        if isinstance(value, str):
            return printable(value)
        return self.text(value)

    def sort_key(self, value: Any) -> Any:
        """Return the sort key of a value: itself, or the lower end of an interval. Empty if it is missing."""
        if self.is_missing(value):
            return ""
        if self.is_interval(value):
            low, _ = value
            return low
        if isinstance(value, tuple):
            return self.text(value)
        if isinstance(value, bool):
            return int(value)
        return value


@dataclass(frozen=True, kw_only=True, eq=False)
class BarColumn:
    """A column of bars, which a terminal draws, red in marked rows. The page has charts instead.

    Attributes:
        key: key of the length in a row. None is no bar.
        largest: the length that fills the column; by default the largest one of the table.
        width: width of the column, in cells of the terminal.
        priority: as in `ReportColumn`.
    """

    key: str
    largest: float | None = None
    width: int = 18
    priority: int = 1


@dataclass(frozen=True, eq=False)
class ReportRow:
    """A row of a table.

    Attributes:
        values: a value for the key of each column, and perhaps others.
        is_marked: true for a row that stands out.
    """

    values: TableRow
    is_marked: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class ReportTable:
    """A table, of any number of rows. A terminal and the page, with its CSV, show the same one.

    Attributes:
        columns: columns, of which the first one names the rows.
        rows: rows, in order.
        name: base name of its CSV file.
        title: title that says what a row is; may be empty.
        caption: explanation below the table.
        mark: kind of the marked rows: ``lowest`` or ``failed``; empty if only their bars show it.
    """

    columns: Sequence[ReportColumn | BarColumn]
    rows: Sequence[ReportRow]
    name: str = ""
    title: str = ""
    caption: str = ""
    mark: str = ""

    @property
    def value_columns(self) -> list[ReportColumn]:
        """Columns except bars."""
        return [column for column in self.columns if isinstance(column, ReportColumn)]

    @property
    def meanings(self) -> str:
        """Sentences that explain the columns, one for each column with a meaning."""
        return " ".join(f"{column.heading}: {column.meaning}." for column in self.value_columns if column.meaning)


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
    rows: Sequence[TableRow]
    draw: Callable[[], ChartType]


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
