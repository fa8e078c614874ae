"""Tables in a terminal: they fit, columns go by priority, and no number or id is ever cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.bar import Bar
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from avss_dist.analysis.section import BarColumn, ReportColumn, ReportRow, ReportTable, Section
from avss_dist.core.text import printable
from avss_dist.core.values import TableRow

WRAPPED = 24  # cells that a column of prose needs at least
BORDER = 3  # cells of the line and the two spaces beside each column
STYLES = {"lowest": "bold red", "failed": "dim", "": ""}
"""Styles of marked rows, by their kind."""
_MANY = 8  # entries of a list that are shown


def rendered(*sections: Section) -> RenderableType:
    """Return sections as a terminal shows them: tables, then sentences."""
    parts: list[RenderableType] = []
    for section in sections:
        if parts:
            parts.append(Text())
        parts.append(Text(printable(section.label), style="bold"))
        for table in section.tables:
            parts.append(FittedTable(table))
        for line in (section.about, *section.sentences):
            if line:
                parts.append(Text(printable(line)))
    return Group(*parts)


@dataclass(frozen=True)
class FittedTable:
    """A table that fits the terminal: it leaves out columns that have no room, and names them in a line below.

    If even the columns that are always shown have no room, each row is a block of lines.
    """

    table: ReportTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        table = self.table
        columns = self._fitting_columns(options.max_width)
        left_out = []
        if columns:
            yield self._grid(columns)
            left_out = [_heading_line(column) for column in table.value_columns if column not in columns]
        else:
            yield from self._blocks()
        for explanation in (table.caption, table.meanings):
            if explanation:
                yield Text(printable(explanation))
        if left_out:
            yield Text(f"No room for: {', '.join(left_out)}. A wider terminal shows them.", style="dim")

    def _fitting_columns(self, max_width: int) -> list[ReportColumn | BarColumn]:
        """Return the columns that fit into lines of so many cells. Empty if those that are always shown do not."""
        columns = list(self.table.columns)
        needed = {column: self._needs(column) + BORDER for column in columns}
        while sum(needed[column] for column in columns) + 1 > max_width:
            # Of columns of the same priority, the last goes first.
            least_important = max(reversed(columns), key=lambda column: column.priority)
            if least_important.priority == 0:
                return []
            columns.remove(least_important)
        return columns

    def _needs(self, column: ReportColumn | BarColumn) -> int:
        """Return the number of screen cells that a column needs."""
        if isinstance(column, BarColumn):
            return column.width
        widest = _text_width(_heading(column))
        for row in self.table.rows:
            widest = max(widest, _text_width(self._cell(column, row).plain))
        return min(widest, WRAPPED) if column.wraps else widest

    def _grid(self, columns: Sequence[ReportColumn | BarColumn]) -> RichTable:
        table = self.table
        grid = RichTable(title=Text(printable(table.title)) if table.title else None, title_style="bold")
        for column in columns:
            if isinstance(column, BarColumn):
                grid.add_column("", no_wrap=True, width=column.width)
                continue
            grid.add_column(
                Text(_heading(column)),
                justify="right" if column.number else "left",
                no_wrap=not column.wraps,
                overflow="fold",
            )
        full_lengths = {column: self._full_length(column) for column in columns if isinstance(column, BarColumn)}
        for row in table.rows:
            cells: list[RenderableType] = []
            for column in columns:
                if isinstance(column, BarColumn):
                    cells.append(_bar(column, row, full_lengths[column]))
                else:
                    cells.append(self._cell(column, row))
            grid.add_row(*cells, style=STYLES[table.mark] if row.is_marked else "")
        return grid

    def _full_length(self, column: BarColumn) -> float:
        """Return the length that fills a column of bars."""
        if column.largest is not None:
            return column.largest
        return max((row.values[column.key] or 0.0 for row in self.table.rows), default=0.0)

    def _cell(self, column: ReportColumn, row: ReportRow) -> Text:
        """Return the text of a cell. The name of a row with the lowest scores has a star behind it."""
        value = row.values[column.key]
        style = ""
        if column.is_missing(value):
            words = column.missing
        else:
            words = column.text(value)
            if column.style:
                style = column.style(value)
        if self.table.mark == "lowest" and column is self.table.columns[0]:
            words += " *" if row.is_marked else "  "
        return Text(words, style=style)

    def _blocks(self) -> Iterator[RenderableType]:
        """Yield a line for each column, row after row."""
        if self.table.title:
            yield Text(printable(self.table.title), style="bold")
        for number, row in enumerate(self.table.rows):
            if number:
                yield Text()
            grid = RichTable.grid(padding=(0, 2))
            grid.add_column(no_wrap=True, style="cyan")
            grid.add_column(overflow="fold")
            for column in self.table.value_columns:
                grid.add_row(Text(_heading(column)), self._cell(column, row))
            yield grid


def _bar(column: BarColumn, row: ReportRow, full_length: float) -> Bar:
    """Return the bar of a row. A negative length has none."""
    length = row.values[column.key] or 0.0
    return Bar(
        full_length if full_length > 0 else 1.0,
        0,
        min(max(0.0, length), full_length),
        width=column.width,
        color="red" if row.is_marked else "cyan",
    )


def _text_width(text: str) -> int:
    """Return the number of screen cells that the widest line of a text takes."""
    return max((cell_len(line) for line in text.splitlines()), default=0)


def _heading(column: ReportColumn) -> str:
    """Return the heading of a column, with the name of its group on a line above."""
    if column.group:
        return printable(f"{column.group}\n{column.heading}")
    return printable(column.heading)


def _heading_line(column: ReportColumn) -> str:
    return _heading(column).replace("\n", " ")


def plain_table(names: Sequence[str], rows: Sequence[TableRow]) -> FittedTable:
    """Return the result of a query as a table: values are never markup, floats have six digits.

    Args:
        names: names of the columns.
        rows: value of each column by name.
    """
    columns = []
    for name in names:
        values = [row[name] for row in rows]
        columns.append(_plain_column(name, values))
    lines = []
    for row in rows:
        texts = {name: describe_value(row[name]) for name in names}
        lines.append(ReportRow(texts))
    return FittedTable(ReportTable(columns=columns, rows=lines))


def _plain_column(name: str, values: Sequence[object]) -> ReportColumn:
    """Return the column of a result with some values: numbers are aligned to the right, texts with spaces wrap."""
    present = [value for value in values if value is not None]
    return ReportColumn(
        name,
        name,
        number=bool(present) and all(isinstance(value, (int, float)) for value in present),
        wraps=any(_is_prose(value) for value in present),
    )


def _is_prose(value: object) -> bool:
    return isinstance(value, (str, list, dict)) and " " in describe_value(value)


def describe_value(value: object) -> str:
    """Return a value as text for people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:z.6g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, list):
        entries = [describe_value(entry) for entry in value[:_MANY]]
        if len(value) > _MANY:
            entries.append(f"... {len(value)} in all")
        return f"[{', '.join(entries)}]"
    if isinstance(value, dict):
        fields = [f"{key}: {describe_value(entry)}" for key, entry in value.items()]
        return f"{{{', '.join(fields)}}}"
    return str(value)
