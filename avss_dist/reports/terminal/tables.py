"""Tables in a terminal: they fit, columns go by priority, and no number or id is ever cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.bar import Bar
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from avss_dist.analysis.section import BarColumn, ReportColumn, ReportTable, Section
from avss_dist.core.text import printable

WRAPPED = 24  # cells that a column of prose needs at least
STYLES = {"lowest": "bold red", "failed": "dim"}  # of marked rows
_MANY = 8  # entries of a list that are shown


def rendered(*sections: Section) -> RenderableType:
    """Return sections as a terminal shows them: tables, then sentences."""
    parts: list[RenderableType] = []
    for section in sections:
        parts.append(Text(printable(section.label), style="bold"))
        parts += map(FittedTable, section.tables)
        parts += [Text(printable(line)) for line in (section.about, *section.sentences) if line]
        parts.append(Text())
    return Group(*parts[:-1])


@dataclass(frozen=True)
class FittedTable:
    """A table that fits the terminal: it leaves out columns that have no room, and names them in a line below.

    If even the columns that are always shown have no room, each row is a block of lines.
    """

    table: ReportTable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        columns = self.table.columns
        visible, needed = list(columns), {column: self._needs(column) + 3 for column in columns}
        while _width(visible, needed) > options.max_width and any(column.priority for column in visible):
            visible.remove(max(reversed(visible), key=lambda column: column.priority))
        if _width(visible, needed) > options.max_width:
            visible = list(columns)
            yield from self._blocks()
        else:
            yield self._grid(visible)
        if lines := [line for line in (self.table.caption, self.table.meanings) if line]:
            yield Text(printable("\n".join(lines)))
        if missing := [_heading(c).replace("\n", " ") for c in self.table.values if c not in visible]:
            yield Text(f"No room for: {', '.join(missing)}. A wider terminal shows them.", style="dim")

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
        for row in table.rows:
            cells = [
                self._bar(column, row) if isinstance(column, BarColumn) else self._cell(column, row)
                for column in columns
            ]
            grid.add_row(*cells, style=STYLES[table.mark] if table.is_marked(row) else "")
        return grid

    def _bar(self, column: BarColumn, row: int) -> Bar:
        largest = column.largest or max((value or 0.0 for value in column.values), default=0.0)
        length = min(max(0.0, column.values[row] or 0.0), largest)
        return Bar(
            largest if largest > 0 else 1.0,
            0,
            length,
            width=column.width,
            color="red" if column.marked and column.marked[row] else "cyan",
        )

    def _cell(self, column: ReportColumn, row: int) -> Text:
        """Return the text of a cell. The name of a row with the lowest scores has a star behind it."""
        missing = column.is_missing(row)
        words = column.missing if missing else column.text(row)
        if self.table.marked and self.table.mark == "lowest" and column is self.table.columns[0]:
            words += " *" if self.table.is_marked(row) else "  "
        return Text(words, style=column.style(column.values[row]) if column.style and not missing else "")

    def _needs(self, column: ReportColumn | BarColumn) -> int:
        """Return the number of screen cells that a column needs."""
        if isinstance(column, BarColumn):
            return column.width
        texts = (_heading(column), *(self._cell(column, row).plain for row in self.table.rows))
        widest = max((cell_len(line) for words in texts for line in words.splitlines()), default=0)
        return min(widest, WRAPPED) if column.wraps else widest

    def _blocks(self) -> Iterator[RenderableType]:
        """Yield a line for each column, row after row."""
        if self.table.title:
            yield Text(printable(self.table.title), style="bold")
        for row in self.table.rows:
            if row:
                yield Text()
            grid = RichTable.grid(padding=(0, 2))
            grid.add_column(no_wrap=True, style="cyan")
            grid.add_column(overflow="fold")
            for column in self.table.values:
                grid.add_row(Text(_heading(column)), self._cell(column, row))
            yield grid


def _width(columns: Sequence[ReportColumn | BarColumn], needed: Mapping[ReportColumn | BarColumn, int]) -> int:
    """Return the number of screen cells that a table of some columns takes."""
    return sum(needed[column] for column in columns) + 1


def _heading(column: ReportColumn) -> str:
    return printable(f"{column.group}\n{column.heading}" if column.group else column.heading)


def plain_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> FittedTable:
    """Return the result of a query as a table: values are never markup, floats have six digits."""
    columns = []
    for i, name in enumerate(names):
        values = [row[i] for row in rows]
        present = [value for value in values if value is not None]
        columns.append(
            ReportColumn(
                str(name),
                [describe_value(value) for value in values],
                missing="",
                number=bool(present) and all(isinstance(value, (int, float)) for value in present),
                wraps=any(isinstance(value, (str, list, dict)) and " " in describe_value(value) for value in present),
            )
        )
    return FittedTable(ReportTable(columns=columns))


def describe_value(value: Any) -> str:
    """Return a value as text for people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:z.6g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, list):
        more = [f"... {len(value)} in all"] if len(value) > _MANY else []
        return "[" + ", ".join([*map(describe_value, value[:_MANY]), *more]) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {describe_value(entry)}" for key, entry in value.items()) + "}"
    return str(value)
