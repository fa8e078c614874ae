"""Choice of the runs and scores of a command."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from avss_dist.cli.program import at_end
from avss_dist.core.errors import QueryError
from avss_dist.core.registry import READING
from avss_dist.core.text import basename
from avss_dist.system.streams import console, say

if TYPE_CHECKING:
    import pyarrow as pa

    from avss_dist.warehouse.reader import Warehouse

MOST_NAMED = 5  # runs that cannot be read


def open_warehouse(root: str) -> Warehouse:
    """Open a warehouse as it is now. When the command ends, runs that could not be read are listed."""
    from avss_dist.warehouse.reader import Warehouse

    opened = Warehouse(root, snapshot=True)
    at_end(lambda: _say_damaged(opened.damaged))
    return opened


def _say_damaged(runs: Mapping[str, str]) -> None:
    if runs:
        from avss_dist.warehouse.schema import DAMAGED

        first = "; ".join(f"{run_id} ({reason})" for run_id, reason in [*sorted(runs.items())][:MOST_NAMED])
        more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
        say(f"{len(runs)} run{'s' if len(runs) > 1 else ''} cannot be read: {first}{more}. {DAMAGED}")


def print_table(format: str, table: Callable[[], pa.Table], shown: Iterable[Any]) -> None:
    """Print what is shown on a terminal, or the rows of a table in another format."""
    from avss_dist.report.output import write_table

    if format == "table":
        for item in shown:
            console().print(item)
    else:
        write_table(table(), format, console())


def choose_runs(warehouse: Warehouse, names: Sequence[str], **options: Any) -> list[dict[str, Any]]:
    """Return runs as `chosen.choose_runs` with these options. If a part of an id was given, the run is printed."""
    from avss_dist.analysis.chosen import choose_runs as choose

    runs = choose(warehouse, names, **options)
    if len(names) == len(runs) == 1 and not {*names[0]} & {*"*?["}:
        run_id, model = runs[0]["run_id"], runs[0]["model"]
        if names[0] not in (run_id, model, basename(model)):
            say(f"Run {run_id} is the one with '{names[0]}' in its id.")
    return runs


def choose_run_ids(warehouse: Warehouse, names: Sequence[str], *, failed: bool = False) -> list[str]:
    """Return the ids of the named runs, or of all finished runs without names, as `choose_runs`."""
    columns = ("run_id", "model")
    return [run["run_id"] for run in choose_runs(warehouse, names, every=True, failed=failed, columns=columns)]


def choose_run(warehouse: Warehouse, name: str | None, *, measured: bool = False) -> dict[str, Any]:
    """Return a run as `chosen.one_run`, or with ``measured`` a checkpoint without one as `chosen.choose_runs`."""
    from avss_dist.analysis.chosen import one_run

    return one_run(choose_runs(warehouse, [name] if name else [], measured=measured), str(name))


def newest_of(warehouse: Warehouse, name: str | None) -> list[str]:
    """Return a line that says that the newest run was chosen, if there are several and none was named."""
    number = warehouse.runs().num_rows
    return [f"This is the newest of {number} runs; --run names another."] if number > 1 and not name else []


def choose_scores(
    warehouse: Warehouse, runs: list[dict[str, Any]], site: str, recipe: str, threshold: str | float
) -> pa.Table:
    """Return the scores of runs at one site, recipe and threshold, as `thresholds.layer_scores`."""
    from avss_dist.analysis.thresholds import layer_scores
    from avss_dist.api.read import named_threshold

    scores = layer_scores(warehouse, runs, named_threshold(threshold), site=site, recipe=recipe)
    if not scores.num_rows:
        run_ids = [run["run_id"] for run in runs]
        raise _not_scored(warehouse.table("scores", run_ids=run_ids, columns=READING), site, recipe, threshold)
    return scores


def score_rows(scores: pa.Table) -> list[dict[str, Any]]:
    """Return rows of scores, with None for NaN."""
    return [{name: None if value != value else value for name, value in row.items()} for row in scores.to_pylist()]


def _not_scored(table: pa.Table, site: str, recipe: str, threshold: str | float) -> QueryError:
    """Return the error for missing scores of a site, recipe and threshold. It lists those that exist."""
    rows = table.group_by(table.column_names).aggregate([]).to_pylist()
    here = [row for row in rows if (row["site"], row["recipe"]) == (site, recipe)]
    if not here:
        scored = sorted({f"{row['site']} {row['recipe']}" for row in rows})
        return QueryError(f"No scores of site '{site}' with recipe '{recipe}'.", f"Scored: {', '.join(scored)}.")
    seen = sorted({(row["threshold_kind"], row["threshold"]) for row in here})
    names = ", ".join(f"{t:g}{'rms' if k == 'rms' else ''}" for k, t in seen)
    return QueryError(f"No scores at threshold {threshold}, and no statistics to compute them.", f"Scored: {names}.")
