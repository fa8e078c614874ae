"""Descriptions of the tables, columns, functions and ready queries of the warehouse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import duckdb
import pyarrow as pa
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.core.text import escape_markdown
from avss_dist.warehouse.query import FUNCTIONS, VIEWS, question_of, ready_queries
from avss_dist.warehouse.schema import SCHEMAS, TABLES


def schema_table() -> pa.Table:
    """Return a table with a row for each column: ``table``, ``column``, ``type`` in SQL, ``unit``, ``meaning``."""
    rows = []
    with duckdb.connect(":memory:") as connection:
        for name, table in TABLES.items():
            connection.register(name, SCHEMAS[name].empty_table())
            described = connection.execute(f"DESCRIBE {name}").fetchall()
            types = {column: kind for column, kind, *_ in described}
            for column in table.columns:
                rows.append(
                    {
                        "table": name,
                        "column": column.name,
                        "type": types[column.name],
                        "unit": column.unit,
                        "meaning": column.meaning,
                    }
                )
    return pa.Table.from_pylist(rows)


def schema_page() -> RenderableType:
    """Return the descriptions of columns, functions and ready queries for the terminal."""
    parts: list[RenderableType] = []
    for name, columns in _columns_by_table().items():
        parts += _chapter(name, TABLES[name].meaning, columns)
    parts += _chapter("views", "what most questions are about", VIEWS.items())
    parts += _chapter("functions", "of SQL, beside DuckDB's own", FUNCTIONS.items())
    queries = [(f"@{name}", question_of(query)) for name, query in ready_queries().items()]
    parts += _chapter("ready queries", "avss query -w WAREHOUSE @name", queries)
    # Each chapter ends with an empty line, which the last one does not need.
    return Group(*parts[:-1])


def _chapter(name: str, meaning: str, rows: Iterable[Sequence[str]]) -> list[RenderableType]:
    """Return a heading, a grid of names and their descriptions, and an empty line."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="cyan")
    for row in rows:
        grid.add_row(*[Text(text) for text in row])
    return [Text.assemble((name, "bold"), f": {meaning}"), grid, ""]


def schema_markdown() -> str:
    """Return the descriptions of columns as Markdown for the documentation: those of several tables, then by table."""
    by_table: dict[str, dict[str, str]] = {}
    for name, columns in _columns_by_table().items():
        by_table[name] = {column.name: column.markdown() for column in columns}
    shared = shared_rows(by_table.values())
    header = ["| Column | Type | Meaning |", "|---|---|---|"]
    lines = ["### Columns of several tables", "", *header, *shared.values(), ""]
    for name, rows in by_table.items():
        own = []
        others = []
        for column, row in rows.items():
            if shared.get(column) == row:
                others.append(f"`{column}`")
            else:
                own.append(row)
        lines += [f"### `{name}`", "", f"{TABLES[name].meaning.capitalize()}.", ""]
        if own:
            lines += [*header, *own, ""]
        if others:
            lines += [f"Also {', '.join(others)}.", ""]
    return "\n".join(lines)


def shared_rows(tables: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the row that most tables have under a key, if several have it, by key."""
    usage: Counter[tuple[str, str]] = Counter()
    for rows in tables:
        usage.update(rows.items())
    frequent: dict[str, str] = {}
    for (key, row), count in usage.most_common():
        if count > 1:
            frequent.setdefault(key, row)
    return {key: row for key, row in usage if frequent.get(key) == row}


class _Column(NamedTuple):
    """A column of a table.

    Attributes:
        name: its name.
        type: its type in SQL.
        description: its meaning and unit.
    """

    name: str
    type: str
    description: str

    def markdown(self) -> str:
        """Return the row of the column in the documentation."""
        return f"| `{self.name}` | {self.type} | {escape_markdown(self.description)} |"


def _columns_by_table() -> dict[str, list[_Column]]:
    """Return the columns of each table."""
    types = {}
    for row in schema_table().to_pylist():
        types[row["table"], row["column"]] = row["type"]
    columns: dict[str, list[_Column]] = {}
    for name, table in TABLES.items():
        columns[name] = []
        for column in table.columns:
            columns[name].append(_Column(column.name, types[name, column.name], column.description))
    return columns
