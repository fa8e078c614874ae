"""Comparing the tables of two warehouses, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from avss_dist.warehouse.reader import Warehouse

MEASURED = ("layer_stats", "scores", "stratum_stats")
PARTIALS = ("shard_stats", "row_stats")
UNITS = ("shard_stats", "cells")
EVALUATED = ("cells", "evaluations", "experiments")
CIRCUMSTANCES = {"created_at", "seconds", "device", "versions"}  # of a measurement; no values


def measured_files(warehouse: Path) -> dict[str, bytes]:
    """The bytes of every file that holds measured columns, by path below the warehouse."""
    return {name: (warehouse / name).read_bytes() for name in _files(warehouse, *MEASURED)}


def unit_times(warehouse: Path) -> dict[str, int]:
    """When the file of each measured unit was written, in nanoseconds, by path below the warehouse."""
    return {name: (warehouse / name).stat().st_mtime_ns for name in _files(warehouse, *UNITS)}


def assert_same_tables(actual: Path, expected: Path) -> None:
    """``layer_stats``, ``scores`` and ``stratum_stats`` are the same bytes, and the partials the same values."""
    assert measured_files(actual) == measured_files(expected)
    files = _files(expected, *PARTIALS)
    assert files == _files(actual, *PARTIALS)
    for file in files:
        assert pq.read_table(actual / file).equals(pq.read_table(expected / file)), file


def assert_same_evaluations(actual: Path, expected: Path) -> None:
    """``cells``, ``evaluations`` and ``experiments`` have the same values; when and where may differ."""
    files = _files(expected, *EVALUATED)
    assert files == _files(actual, *EVALUATED)
    for file in files:
        ours = _without_circumstances(actual / file)
        theirs = _without_circumstances(expected / file)
        assert ours.equals(theirs), file


def evaluation_rows(warehouse: str | Path, task: str) -> list[dict[str, Any]]:
    """Return the rows of ``evaluations`` of a task."""
    return [row for row in table_rows(warehouse, "evaluations") if row["task"] == task]


def table_rows(warehouse: str | Path, table: str) -> list[dict[str, Any]]:
    """Return all rows of a table."""
    rows: list[dict[str, Any]] = Warehouse(warehouse).table(table).to_pylist()
    return rows


def run_rows(warehouse: str | Path) -> list[dict[str, Any]]:
    """Return the row of every run, failed ones too."""
    rows: list[dict[str, Any]] = Warehouse(warehouse).runs().to_pylist()
    return rows


def _without_circumstances(file: Path) -> pa.Table:
    table = pq.ParquetFile(file).read()
    return table.drop_columns(sorted(CIRCUMSTANCES.intersection(table.schema.names)))


def _files(warehouse: Path, *tables: str) -> list[str]:
    files = []
    for name in tables:
        files += [str(file.relative_to(warehouse)) for file in (warehouse / name).rglob("*.parquet")]
    return sorted(files)
