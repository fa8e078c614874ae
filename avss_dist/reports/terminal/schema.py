"""Descriptions of the tables, columns, functions and ready queries of the warehouse."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

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
            types = {column: kind for column, kind, *_ in connection.execute(f"DESCRIBE {name}").fetchall()}
            rows += [
                {"table": name, "column": c.name, "type": types[c.name], "unit": c.unit, "meaning": c.meaning}
                for c in table.columns
            ]
    return pa.Table.from_pylist(rows)


def schema_page() -> RenderableType:
    """Return the descriptions of columns, functions and ready queries for the terminal."""
    answers = ((f"@{name}", question_of(query)) for name, query in ready_queries().items())
    chapters: list[tuple[str, str, Iterable[tuple[str, ...]]]] = [
        *((name, TABLES[name].meaning, rows) for name, rows in _by_table().items()),
        ("views", "what most questions are about", VIEWS.items()),
        ("functions", "of SQL, beside DuckDB's own", FUNCTIONS.items()),
        ("ready queries", "avss query -w WAREHOUSE @name", answers),
    ]
    parts: list[RenderableType] = []
    for name, meaning, rows in chapters:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True, style="cyan")
        for row in rows:
            grid.add_row(*map(Text, row))
        parts += [Text.assemble((name, "bold"), f": {meaning}"), grid, ""]
    return Group(*parts[:-1])


def schema_markdown() -> str:
    """Return the descriptions of columns as Markdown for the documentation: those of several tables, then by table."""
    by_table = {
        name: {c: f"| `{c}` | {kind} | {escape_markdown(text)} |" for c, kind, text in rows}
        for name, rows in _by_table().items()
    }
    shared = shared_rows(by_table.values())
    header = ["| Column | Type | Meaning |", "|---|---|---|"]
    lines = ["### Columns of several tables", "", *header, *shared.values(), ""]
    for name, rows in by_table.items():
        own = [row for column, row in rows.items() if shared.get(column) != row]
        also = [f"`{column}`" for column, row in rows.items() if shared.get(column) == row]
        lines += [f"### `{name}`", "", f"{TABLES[name].meaning.capitalize()}.", ""]
        lines += [*header, *own, ""] if own else []
        lines += [f"Also {', '.join(also)}.", ""] if also else []
    return "\n".join(lines)


def shared_rows(tables: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """Return the row that most tables have under a key, if several have it, by key."""
    usage = Counter(item for rows in tables for item in rows.items())
    frequent = {key: row for (key, row), count in reversed(usage.most_common()) if count > 1}
    return {key: row for key, row in usage if frequent.get(key) == row}


def _by_table() -> dict[str, list[tuple[str, str, str]]]:
    """Return name, type in SQL and description of each column, by table."""
    types = {(row["table"], row["column"]): row["type"] for row in schema_table().to_pylist()}
    return {
        name: [(column.name, types[name, column.name], column.description) for column in table.columns]
        for name, table in TABLES.items()
    }
