"""Which runs and scores a command is about."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from avss_dist.errors import QueryError, nearest, require_known
from avss_dist.settings import RECIPES, SITES
from avss_dist.text import parse_threshold

if TYPE_CHECKING:
    from avss_dist.stats.scores import Threshold
    from avss_dist.warehouse.reader import Warehouse


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


def choose_scores(
    warehouse: Warehouse, runs: list[dict[str, Any]], site: str, recipe: str, threshold: str
) -> list[dict[str, Any]]:
    """The stored scores of runs at one site, recipe and threshold, by run and layer."""
    require_place(site, recipe)
    value, kind = parse_threshold(threshold)
    rows = warehouse.table("scores", run_ids=[run["run_id"] for run in runs]).to_pylist()
    scored = sorted({f"{row['site']} {row['recipe']}" for row in rows})
    rows = [row for row in rows if (row["site"], row["recipe"]) == (site, recipe)]
    if not rows:
        raise QueryError(f"No scores of site '{site}' with recipe '{recipe}'.", f"Scored: {', '.join(scored)}.")
    wanted = [row for row in rows if (row["threshold"], row["threshold_kind"]) == (value, kind)]
    if not wanted:
        seen = sorted({(r["threshold_kind"], r["threshold"]) for r in rows})
        names = ", ".join(f"{t:g}{'rms' if k == 'rms' else ''}" for k, t in seen)
        raise QueryError(f"No scores at threshold {threshold}.", f"Scored: {names}. avss scores computes any other.")
    return sorted(wanted, key=lambda row: (row["run_id"], row["layer"]))


def require_place(site: str, recipe: str) -> None:
    """Refuse a site or a recipe that does not exist, and name the nearest."""
    require_known("site", site, SITES)
    require_known("recipe", recipe, RECIPES)


def choose_threshold(text: str) -> Threshold:
    """``1e-5``, or ``0.1rms``, as scoring has it."""
    from avss_dist.stats.scores import Threshold

    value, kind = parse_threshold(text)
    return Threshold(value=value, kind=kind)
