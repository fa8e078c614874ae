"""Which runs a command is about."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from avss_dist.errors import QueryError, nearest, require_known

if TYPE_CHECKING:
    from avss_dist.query import Warehouse


def choose_runs(warehouse: Warehouse, names: list[str], *, every: bool = False) -> list[dict[str, Any]]:
    """The ``runs`` rows of the named runs, in the order in which they are named.

    Args:
        names: ids, or globs of them such as ``smollm2-*``, which choose runs that are done.
        every: without names, take every run that is done, by id; else the newest one.

    Raises:
        QueryError: a name that no run has (the nearest is named), a glob that matches none, a run that failed.
    """
    rows = warehouse.runs().to_pylist(maps_as_pydicts="strict")
    done = {row["run_id"]: row for row in sorted(rows, key=lambda row: row["run_id"]) if row["status"] == "done"}
    failed = {row["run_id"]: row for row in rows if row["status"] != "done"}
    if not done and not failed.keys() & set(names):
        raise QueryError(f"{warehouse.root} has no finished run.", "avss score makes one.")
    if not names:
        return list(done.values()) if every else [max(done.values(), key=lambda row: row["created_at"])]
    chosen: dict[str, dict[str, Any]] = {}
    for name in names:
        if set(name) & set("*?["):
            matches = [run_id for run_id in done if fnmatchcase(run_id, name)]
            if not matches:
                raise QueryError(f"No run matches '{name}'.", nearest(name, done))
        else:
            if name in failed:
                raise QueryError(f"Run '{name}' failed: {failed[name]['error']}", "Mend that and run avss score again.")
            matches = [require_known("run", name, done, QueryError)]
        chosen |= {run_id: done[run_id] for run_id in matches}
    return list(chosen.values())
