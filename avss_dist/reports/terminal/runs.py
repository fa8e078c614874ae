"""The list of runs, in lines that fit into a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from avss_dist.core.text import basename
from avss_dist.reports.terminal.tables import BORDER, describe_value
from avss_dist.warehouse.schema import UNFINISHED

LEAST_TELLING = ("dtype", "tokens", "created")
"""Columns that are left out where lines are too long, in this order; last the status, if all runs are done."""

DATE_LENGTH = len("2026-12-31")

Columns = dict[str, list[Any]]
"""Values by heading."""


def runs_list(table: pa.Table, width: int) -> tuple[pa.Table, list[str]]:
    """Return a table of runs that fits into lines of ``width`` cells, and the columns that it leaves out.

    Models and texts have the last parts of their names, if these differ as the names do. Where lines are too long,
    times become dates, and ids the digits that end them, which name a run as well.

    Args:
        table: runs, with the columns `read_commands.RUNS`.
    """
    rows = table.to_pylist()
    columns: Columns = {
        "model": _shortened([row["model"] or "" for row in rows], basename),
        "corpus": _shortened([row["corpus"] or "" for row in rows], basename),
        "run": [row["run_id"] for row in rows],
        "status": [_status(row) for row in rows],
        "tokens": [row["num_tokens"] for row in rows],
        "dtype": [row["dtype"] for row in rows],
        "created": [describe_value(row["created_at"]) for row in rows],
    }
    if not _fits(columns, width):
        columns["created"] = [time[:DATE_LENGTH] for time in columns["created"]]
    if not _fits(columns, width):
        columns["run"] = _shortened(columns["run"], _last_part)
    least_telling = list(LEAST_TELLING)
    if set(columns["status"]) == {"done"}:
        least_telling.append("status")
    left_out = []
    for name in least_telling:
        if not _fits(columns, width):
            left_out.append(name)
            del columns[name]
    return pa.table(columns), left_out


def _last_part(run_id: str) -> str:
    """Return the digits at the end of an id."""
    return run_id.rpartition("-")[2]


def _status(run: Mapping[str, Any]) -> str:
    """Return the status of a run, with the number of stored shards of an unfinished one."""
    if run["status"] != UNFINISHED:
        return str(run["status"])
    if run["num_shards"]:
        return f"{UNFINISHED}, {run['kept_shards']} of {run['num_shards']} shards"
    return f"{UNFINISHED}, {run['kept_shards']} shards"


def _shortened(names: Sequence[str], shorten: Callable[[str], str]) -> list[str]:
    """Return short names, or the names themselves if two that differ would be the same."""
    short = [shorten(name) for name in names]
    if len(set(short)) < len(set(names)):
        return list(names)
    return short


def _fits(columns: Columns, width: int) -> bool:
    """Whether a table of columns fits into lines of so many cells."""
    needed = 1
    for name, values in columns.items():
        needed += BORDER + max(len(describe_value(value)) for value in (name, *values))
    return needed <= width
