"""Which runs and scores a command is about."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from avss_dist.cli.base import at_end
from avss_dist.errors import QueryError, nearest, require_known
from avss_dist.system.streams import say
from avss_dist.text import parse_threshold

if TYPE_CHECKING:
    import pyarrow as pa

    from avss_dist.stats.scores import Threshold
    from avss_dist.warehouse.reader import Warehouse

MOST_NAMED = 5  # runs that cannot be read


def open_warehouse(root: str) -> Warehouse:
    """A warehouse; when the command ends, it says which runs could not be read."""
    from avss_dist.warehouse.reader import Warehouse

    opened = Warehouse(root)
    at_end(lambda: _say_damaged(opened.damaged))
    return opened


def _say_damaged(runs: Mapping[str, str]) -> None:
    if runs:
        from avss_dist.warehouse.schema import DAMAGED

        first = "; ".join(f"{run_id} ({reason})" for run_id, reason in [*sorted(runs.items())][:MOST_NAMED])
        more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
        say(f"{len(runs)} run{'s' if len(runs) > 1 else ''} cannot be read: {first}{more}. {DAMAGED}")


def choose_runs(
    warehouse: Warehouse, names: list[str], *, every: bool = False, failed: bool = False
) -> list[dict[str, Any]]:
    """The ``runs`` rows of the named runs, in the order in which they are named.

    Args:
        names: ids, parts of an id that no other has, or globs such as ``smollm2-*``, which choose all that match.
        every: without names, take every run, by id; else the newest one.
        failed: choose among runs that failed, too; they have no scores.

    Raises:
        QueryError: a name that no run has (the nearest is named) or that several have, a glob that matches none, a run
            that failed.
    """
    rows = sorted(warehouse.runs().to_pylist(maps_as_pydicts="lossy"), key=lambda row: row["run_id"])
    valid = {row["run_id"]: row for row in rows if failed or row["status"] == "done"}
    errors = {row["run_id"]: row["error"] for row in rows if row["run_id"] not in valid}
    if not valid and not errors.keys() & set(names):
        raise QueryError(f"{warehouse.root} has no finished run.", "avss score makes one.")
    if not names:
        return list(valid.values()) if every else [max(valid.values(), key=lambda row: str(row["created_at"]))]
    chosen: dict[str, dict[str, Any]] = {}
    for name in names:
        if name in errors:
            raise QueryError(f"Run '{name}' failed: {errors[name]}", "Fix that, then run avss score again.")
        chosen |= {run_id: valid[run_id] for run_id in _matching(name, valid)}
    return list(chosen.values())


def choose_run(warehouse: Warehouse, name: str | None) -> dict[str, Any]:
    """The ``runs`` row of the one run of that name; the newest one without a name.

    Raises:
        QueryError: no run that is done has the name, or several have.
    """
    chosen = choose_runs(warehouse, [name] if name else [])
    if len(chosen) > 1:
        names = [row["run_id"] for row in chosen]
        raise QueryError(f"'{name}' matches {len(chosen)} runs.", f"Name one. {nearest(str(name), names)}")
    return chosen[0]


def _matching(name: str, run_ids: Mapping[str, Any]) -> list[str]:
    """The ids that a name stands for."""
    if name in run_ids:
        return [name]
    if set(name) & set("*?["):
        if matches := [run_id for run_id in run_ids if fnmatchcase(run_id, name)]:
            return matches
        raise QueryError(f"No run matches '{name}'.", nearest(name, run_ids))
    begins_a_word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}")
    parts = [run_id for run_id in run_ids if name and begins_a_word.search(run_id)]
    if len(parts) > 1:
        raise QueryError(f"'{name}' is part of {len(parts)} runs.", f"{nearest(name, parts)} For all: '*{name}*'.")
    if not parts:
        require_known("run", name, run_ids, QueryError)
    say(f"Run {parts[0]} is the one with '{name}' in its id.")
    return parts


def choose_scores(
    warehouse: Warehouse, runs: list[dict[str, Any]], site: str, recipe: str, threshold: str
) -> list[dict[str, Any]]:
    """The stored scores of runs at one site, recipe and threshold, by run and layer."""
    import pyarrow.compute as pc

    value, kind = parse_threshold(threshold)
    run_ids = [run["run_id"] for run in runs]
    at = {"site": site, "recipe": recipe, "threshold": value, "threshold_kind": kind}
    where = pc.scalar(True)
    for name, wanted in at.items():
        where &= pc.field(name) == wanted
    rows = warehouse.table("scores", run_ids=run_ids, where=where).sort_by(
        [("run_id", "ascending"), ("layer", "ascending")]
    )
    if not rows.num_rows:
        raise _not_scored(warehouse.table("scores", run_ids=run_ids, columns=list(at)), site, recipe, threshold)
    return [{name: None if value != value else value for name, value in row.items()} for row in rows.to_pylist()]  # NaN


def _not_scored(table: pa.Table, site: str, recipe: str, threshold: str) -> QueryError:
    """What to say where there are no scores of a site, recipe and threshold: which there are."""
    rows = table.group_by(table.column_names).aggregate([]).to_pylist()
    here = [row for row in rows if (row["site"], row["recipe"]) == (site, recipe)]
    if not here:
        scored = sorted({f"{row['site']} {row['recipe']}" for row in rows})
        return QueryError(f"No scores of site '{site}' with recipe '{recipe}'.", f"Scored: {', '.join(scored)}.")
    seen = sorted({(row["threshold_kind"], row["threshold"]) for row in here})
    names = ", ".join(f"{t:g}{'rms' if k == 'rms' else ''}" for k, t in seen)
    return QueryError(f"No scores at threshold {threshold}.", f"Scored: {names}. avss scores computes any other.")


def choose_threshold(text: str) -> Threshold:
    """``1e-5``, or ``0.1rms``, as scoring has it."""
    from avss_dist.stats.scores import Threshold

    value, kind = parse_threshold(text)
    return Threshold(value=value, kind=kind)
