"""The list of runs, in lines that fit into a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa

from avss_dist.core.text import basename
from avss_dist.reports.terminal.tables import describe_value
from avss_dist.warehouse.schema import UNFINISHED

LEAST_TELLING = ("dtype", "tokens", "created")
"""Columns that are left out where lines are too long, in this order; last the status, if all runs are done."""

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
        columns["created"] = [time[: len("2026-12-31")] for time in columns["created"]]
    if not _fits(columns, width):
        columns["run"] = _shortened(columns["run"], lambda run_id: run_id.rpartition("-")[2])
    all_done = {*columns["status"]} == {"done"}
    left_out = []
    for name in (*LEAST_TELLING, *(["status"] if all_done else [])):
        if not _fits(columns, width):
            left_out.append(name)
            del columns[name]
    return pa.table(columns), left_out


def _status(run: Mapping[str, Any]) -> str:
    """Return the status of a run, with the number of stored shards of an unfinished one."""
    if run["status"] != UNFINISHED:
        return str(run["status"])
    total = f" of {run['num_shards']}" if run["num_shards"] else ""
    return f"{UNFINISHED}, {run['kept_shards']}{total} shards"


def _shortened(names: Sequence[str], shorten: Callable[[str], str]) -> list[str]:
    """Return short names, or the names themselves if two that differ would be the same."""
    short = [shorten(name) for name in names]
    return short if len({*short}) == len({*names}) else list(names)


def _fits(columns: Columns, width: int) -> bool:
    """Whether a table of columns fits into lines of so many cells."""
    widths = [max(len(describe_value(value)) for value in [name, *values]) for name, values in columns.items()]
    return sum(widths) + 3 * len(widths) + 1 <= width
