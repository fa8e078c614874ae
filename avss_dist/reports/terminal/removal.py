"""The files that a removal deletes, for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

from avss_dist.analysis.section import ReportColumn, ReportRow, ReportTable
from avss_dist.core.text import describe_bytes, describe_count
from avss_dist.core.values import TableRow
from avss_dist.reports.terminal.tables import FittedTable
from avss_dist.warehouse.reader import grouped
from avss_dist.warehouse.removal import PATCH, Removal

KEY_LENGTH = 12  # digits of a patch's name that are shown


_COLUMNS = (
    ReportColumn("removed", "name", number=False),
    ReportColumn("what", "what", number=False, wraps=True),
    ReportColumn("rows", "contents", number=False, wraps=True),
    ReportColumn("files", "files", describe_count),
    ReportColumn("size", "bytes", describe_bytes),
)


def removal_table(removal: Removal) -> FittedTable:
    """Return a table with a row for each run, evaluation and repair that a removal deletes."""
    by_id = grouped(removal.table().to_pylist(), itemgetter("run_id"))
    return FittedTable(ReportTable(columns=_COLUMNS, rows=[_removed_row(tables) for tables in by_id.values()]))


def _removed_row(tables: Sequence[TableRow]) -> ReportRow:
    """Return the row of a run, an evaluation or a repair.

    Args:
        tables: its rows of `Removal.table`, one for each table of the warehouse.
    """
    first = tables[0]
    name = first["run_id"]
    what = first["kind"]
    if first["kind"] == PATCH:
        name = name[:KEY_LENGTH]
        what = "repair"
    elif first["about"]:
        what += f", {first['about']}"
    return ReportRow(
        {
            "name": name,
            "what": what,
            "contents": _contents(tables),
            "files": sum(row["files"] for row in tables),
            "bytes": sum(row["bytes"] for row in tables),
        }
    )


def _contents(tables: Sequence[TableRow]) -> str:
    """Return the number of rows of each table. Repairs have none, nor has a run that has stored nothing yet."""
    contents = []
    for row in tables:
        if row["kind"] != PATCH and row["table"]:
            contents.append(f"{row['table']} {describe_count(row['rows'])}")
    return ", ".join(contents) or "-"
