"""A query's result, printed."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pyarrow as pa

if TYPE_CHECKING:
    from rich.console import Console


def write_table(table: pa.Table, kind: str, console: Console) -> None:
    """Write a table to standard output as ``table``, ``csv``, ``json`` (one object a line) or ``parquet``."""
    if kind == "table":
        from avss_dist.report.table import plain_table

        console.print(plain_table(table.column_names, [tuple(row.values()) for row in _rows(table)]))
    elif kind == "json":
        for row in _rows(table):
            print(json.dumps(row, default=str))
    elif kind == "csv":
        import csv

        writer = csv.writer(sys.stdout)
        writer.writerow(table.column_names)
        writer.writerows(row.values() for row in _rows(table))
    else:
        import pyarrow.parquet as pq

        pq.write_table(table, sys.stdout.buffer, compression="zstd")


def _rows(table: pa.Table) -> list[dict[str, object]]:
    return table.to_pylist(maps_as_pydicts="lossy")
