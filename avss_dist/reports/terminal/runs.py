"""The list of runs, in lines that fit into a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa

from avss_dist.core.text import basename
from avss_dist.core.values import TableRow
from avss_dist.reports.terminal.tables import BORDER, describe_value
from avss_dist.warehouse.schema import UNFINISHED

LEAST_TELLING = ("dtype", "tokens", "created")
"""Columns that are left out where lines are too long, in this order.

Then follow the status, if all runs are done, and the seed, if one is known.
"""

HEADINGS = ("model", "corpus", "run", "seed", "status", "tokens", "dtype", "created")
"""Headings in their order. That of seeds is left out where no run has one."""
DATE_LENGTH = len("2026-12-31")
ListedRun = dict[str, Any]
"""Values of a run by heading."""


def runs_list(table: pa.Table, width: int) -> tuple[pa.Table, list[str]]:
    """Return a table of runs that fits into lines of ``width`` cells, and the columns that it leaves out.

    Models and texts have the last parts of their names, if these differ as the names do. Where lines are too long,
    times become dates, and ids the digits that end them, which name a run as well.

    Args:
        table: runs, with the columns `read_commands.RUNS`.
    """
    runs = [_listed_run(row) for row in table.to_pylist()]
    headings = list(HEADINGS)
    if all(run["seed"] is None for run in runs):
        headings.remove("seed")
    _shorten(runs, "model", basename)
    _shorten(runs, "corpus", basename)
    if not _fit(runs, headings, width):
        for run in runs:
            run["created"] = run["created"][:DATE_LENGTH]
    if not _fit(runs, headings, width):
        _shorten(runs, "run", _last_part)
    least_telling = list(LEAST_TELLING)
    if {run["status"] for run in runs} == {"done"}:
        least_telling.append("status")
    if "seed" in headings:
        least_telling.append("seed")
    left_out = []
    for heading in least_telling:
        if not _fit(runs, headings, width):
            left_out.append(heading)
            headings.remove(heading)
    columns = {}
    for heading in headings:
        columns[heading] = [run[heading] for run in runs]
    return pa.table(columns), left_out


def _listed_run(row: TableRow) -> ListedRun:
    """Return the values of a run."""
    return {
        "model": row["model"] or "",
        "corpus": row["corpus"] or "",
        "run": row["run_id"],
        "seed": row["seed"],
        "status": _status(row),
        "tokens": row["num_tokens"],
        "dtype": row["dtype"],
        "created": describe_value(row["created_at"]),
    }


def _last_part(run_id: str) -> str:
    """Return the digits at the end of an id."""
    return run_id.rpartition("-")[2]


def _status(run: TableRow) -> str:
    """Return the status of a run, with the number of stored shards of an unfinished one."""
    if run["status"] != UNFINISHED:
        return str(run["status"])
    if run["num_shards"]:
        return f"{UNFINISHED}, {run['kept_shards']} of {run['num_shards']} shards"
    return f"{UNFINISHED}, {run['kept_shards']} shards"


def _shorten(runs: Sequence[ListedRun], heading: str, shorten: Callable[[str], str]) -> None:
    """Replace the names under a heading by short ones, unless two that differ would be the same."""
    short = {run[heading]: shorten(run[heading]) for run in runs}
    if len(set(short.values())) == len(short):
        for run in runs:
            run[heading] = short[run[heading]]


def _fit(runs: Sequence[ListedRun], headings: Sequence[str], width: int) -> bool:
    """Whether a table of runs fits into lines of so many cells."""
    needed = 1
    for heading in headings:
        widest = max((len(describe_value(run[heading])) for run in runs), default=0)
        needed += max(widest, len(heading)) + BORDER
    return needed <= width
