"""Tables that fit a terminal: columns go by priority, and no number or id is ever cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.text import printable

WRAPPED = 24  # cells that a column of prose needs at least
_MANY = 8  # entries of a list that are shown


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column: its title, and a text (or a bar, whose width is ``width``) for each row.

    Attributes:
        priority: 0 is always shown; of the others, the highest number is left out first.
        number: aligned to the right.
        wraps: prose, which may be broken into lines.
    """

    title: str
    cells: Sequence[RenderableType]
    priority: int = 0
    number: bool = True
    wraps: bool = False
    width: int | None = None

    @property
    def needs(self) -> int:
        """Cells of the screen."""
        if self.width is not None:
            return max(self.width, cell_len(self.title))
        lines = [line for cell in (self.title, *self.cells) for line in str(cell).splitlines()]
        widest = max(map(cell_len, lines), default=0)
        return min(widest, WRAPPED) if self.wraps else widest


class FittedTable:
    """A table without the columns that there is no room for, which a line below it names.

    Where not even the columns that are always shown have room, each row is a block of lines.
    """

    def __init__(
        self, columns: Sequence[Column], *, title: str = "", caption: Text | None = None, styles: Sequence[str] = ()
    ) -> None:
        self._columns, self._title, self._caption, self._styles = columns, title, caption, styles

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        shown = list(self._columns)
        while _width(shown) > options.max_width and any(column.priority for column in shown):
            shown.remove(max(reversed(shown), key=lambda column: column.priority))
        if _width(shown) > options.max_width:
            shown = list(self._columns)
            yield from _blocks(shown, self._title)
        else:
            yield self._table(shown)
        if self._caption:
            yield self._caption
        if missing := [
            column.title.replace("\n", " ") for column in self._columns if column not in shown and column.title
        ]:
            yield Text(f"No room for: {', '.join(missing)}. A wider terminal shows them.", style="dim")

    def _table(self, columns: Sequence[Column]) -> Table:
        table = Table(title=Text(printable(self._title)) if self._title else None, title_style="bold")
        for column in columns:
            table.add_column(
                Text(printable(column.title)),
                justify="right" if column.number else "left",
                no_wrap=not column.wraps,
                overflow="fold",
                width=column.width,
            )
        rows = zip(*(column.cells for column in columns), strict=True)
        for i, row in enumerate(rows):
            style = self._styles[i] if i < len(self._styles) else ""
            table.add_row(*(Text(printable(cell)) if isinstance(cell, str) else cell for cell in row), style=style)
        return table


def _width(columns: Sequence[Column]) -> int:
    return sum(column.needs + 3 for column in columns) + 1


def _blocks(columns: Sequence[Column], title: str) -> Iterator[RenderableType]:
    """A line for each column that is a text, row after row."""
    if title:
        yield Text(printable(title), style="bold")
    texts = [column for column in columns if column.width is None]
    for i in range(len(texts[0].cells) if texts else 0):
        if i:
            yield Text()
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="cyan")
        grid.add_column(overflow="fold")
        for column in texts:
            grid.add_row(Text(printable(column.title)), Text(printable(str(column.cells[i]))))
        yield grid


def plain_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> FittedTable:
    """Any query's result: values as they are, never as markup; floats with six significant digits."""
    columns = []
    for i, name in enumerate(names):
        values = [row[i] for row in rows]
        known = [value for value in values if value is not None]
        columns.append(
            Column(
                title=str(name),
                cells=[shown(value) for value in values],
                number=bool(known) and all(isinstance(value, (int, float)) for value in known),
                wraps=any(isinstance(value, (str, list, dict)) and " " in shown(value) for value in known),
            )
        )
    return FittedTable(columns)


def shown(value: Any) -> str:
    """A value for people."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:z.6g}"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M:%S}"
    if isinstance(value, list):
        more = [f"... {len(value)} in all"] if len(value) > _MANY else []
        return "[" + ", ".join([*map(shown, value[:_MANY]), *more]) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(one)}" for key, one in value.items()) + "}"
    return str(value)
