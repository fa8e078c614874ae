"""What every table, column, function and ready query of the warehouse means, printed."""

from __future__ import annotations

from collections.abc import Iterable

import duckdb
import pyarrow as pa
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from avss_dist.warehouse.columns import COLUMNS, TABLES_MEAN
from avss_dist.warehouse.reader import FUNCTIONS, ready_queries
from avss_dist.warehouse.store import SCHEMAS


def schema_table() -> pa.Table:
    """A row for each column: ``table``, ``column``, ``type`` in SQL, ``meaning``."""
    rows = []
    with duckdb.connect(":memory:") as connection:
        for name, schema in SCHEMAS.items():
            connection.register(name, schema.empty_table())
            kinds = {column: kind for column, kind, *_ in connection.execute(f"DESCRIBE {name}").fetchall()}
            rows += [
                {"table": name, "column": column, "type": kinds[column], "meaning": COLUMNS[name][column]}
                for column in schema.names
            ]
    return pa.Table.from_pylist(rows)


def schema_page() -> RenderableType:
    """The same for the terminal, and the functions and ready queries."""
    rows = schema_table().to_pylist()
    parts: list[RenderableType] = []
    for name, meaning in TABLES_MEAN.items():
        columns = [(r["column"], r["type"], r["meaning"]) for r in rows if r["table"] == name]
        parts += [_titled(name, meaning), _grid(columns), ""]
    parts += [_titled("functions", "of SQL, beside DuckDB's own"), _grid(FUNCTIONS.items()), ""]
    answers = [(f"@{name}", query.splitlines()[0].removeprefix("-- ")) for name, query in ready_queries().items()]
    parts += [_titled("ready queries", "avss query WAREHOUSE @name"), _grid(answers)]
    return Group(*parts)


def _titled(name: str, meaning: str) -> Text:
    return Text.assemble((name, "bold"), f": {meaning}")


def _grid(rows: Iterable[tuple[str, ...]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, style="cyan")
    for row in rows:
        grid.add_row(*(Text(cell) for cell in row))
    return grid
