"""Comparing the tables of two warehouses, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

MEASURED = ("layer_stats", "scores")


def measured_files(warehouse: Path) -> dict[str, bytes]:
    """The bytes of every file that holds measured columns, by path below the warehouse."""
    return {
        str(file.relative_to(warehouse)): file.read_bytes()
        for name in MEASURED
        for file in sorted((warehouse / name).rglob("*.parquet"))
    }


def assert_same_tables(actual: Path, expected: Path) -> None:
    """``layer_stats`` and ``scores`` are the same bytes, and the partials the same values."""
    assert measured_files(actual) == measured_files(expected)
    files = sorted(file.relative_to(expected) for file in (expected / "shard_stats").rglob("*.parquet"))
    assert files == sorted(file.relative_to(actual) for file in (actual / "shard_stats").rglob("*.parquet"))
    for file in files:
        assert pq.read_table(actual / file).equals(pq.read_table(expected / file)), file
