"""The files that a removal deletes, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from avss_dist.analysis.section import ReportColumn, ReportTable
from avss_dist.core.text import describe_bytes, describe_count
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.warehouse.reader import grouped
from avss_dist.warehouse.removal import PATCH, Removal

KEY_LENGTH = 12  # digits of a patch's name that are shown


def removal_table(removal: Removal) -> FittedTable:
    """Return a table with a row for each run, evaluation and repair that a removal deletes."""
    by_id = grouped(removal.table().to_pylist(), lambda row: row["run_id"])
    columns = [
        ReportColumn("removed", [_name(rows[0]) for rows in by_id.values()], number=False),
        ReportColumn("what", [_what(rows[0]) for rows in by_id.values()], number=False, wraps=True),
        ReportColumn("rows", [_contents(rows) for rows in by_id.values()], number=False, wraps=True),
        ReportColumn("files", [sum(row["files"] for row in rows) for rows in by_id.values()], describe_count),
        ReportColumn("size", [sum(row["bytes"] for row in rows) for rows in by_id.values()], describe_bytes),
    ]
    return FittedTable(ReportTable(columns=columns))


def _name(row: Mapping[str, Any]) -> str:
    return str(row["run_id"][:KEY_LENGTH] if row["kind"] == PATCH else row["run_id"])


def _what(row: Mapping[str, Any]) -> str:
    if row["kind"] == PATCH:
        return "repair"
    return f"{row['kind']}, {row['about']}" if row["about"] else str(row["kind"])


def _contents(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the number of rows of each table. Repairs have none, nor has a run that has stored nothing yet."""
    tables = [row for row in rows if row["kind"] != PATCH and row["table"]]
    return ", ".join(f"{row['table']} {describe_count(row['rows'])}" for row in tables) or "-"
