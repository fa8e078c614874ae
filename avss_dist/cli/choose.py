"""Functions for commands about a warehouse: open it and find the runs that are named, and print a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from avss_dist.cli.program import at_end
from avss_dist.core.text import basename
from avss_dist.read_requests import WarehouseRequest
from avss_dist.system.streams import console, say

if TYPE_CHECKING:
    import pyarrow as pa

    from avss_dist.warehouse.reader import Warehouse

Q = TypeVar("Q", bound=WarehouseRequest)
MOST_NAMED = 5  # runs that cannot be read


def _say_damaged(runs: Mapping[str, str]) -> None:
    if runs:
        from avss_dist.warehouse.schema import DAMAGED

        first = "; ".join(f"{run_id} ({reason})" for run_id, reason in [*sorted(runs.items())][:MOST_NAMED])
        more = f" and {len(runs) - MOST_NAMED} more" if len(runs) > MOST_NAMED else ""
        say(f"{len(runs)} run{'s' if len(runs) > 1 else ''} cannot be read: {first}{more}. {DAMAGED}")


def print_table(format: str, table: Callable[[], pa.Table], shown: Iterable[Any]) -> None:
    """Print what is shown on a terminal, or the rows of a table in another format."""
    from avss_dist.reports.output import write_table

    if format == "table":
        for item in shown:
            console().print(item)
    else:
        write_table(table(), format, console())


def open_for(request: Q, **options: Any) -> tuple[Warehouse, Q]:
    """Open the warehouse of a request as it is now. When the command ends, runs that could not be read are listed.

    Args:
        options: of `chosen.choose_runs`.

    Returns:
        The warehouse, and the request with the ids of the runs that it names. If it names one by a part of its id, that
        run is printed.
    """
    from avss_dist.analysis.chosen import choose_runs, one_run
    from avss_dist.warehouse.reader import Warehouse

    opened = Warehouse(str(request.warehouse), snapshot=True)
    at_end(lambda: _say_damaged(opened.damaged))
    run = getattr(request, "run", None)
    if not run:
        return opened, request
    several = isinstance(run, tuple)
    names = run if several else [run]
    runs = choose_runs(opened, names, columns=("run_id", "model"), **options)
    if len(names) == len(runs) == 1 and not {*names[0]} & {*"*?["}:
        run_id, model = runs[0]["run_id"], runs[0]["model"]
        if names[0] not in (run_id, model, basename(model)):
            say(f"Run {run_id} is the one with '{names[0]}' in its id.")
    run_ids = tuple(row["run_id"] for row in runs)
    chosen: dict[str, Any] = {"run": run_ids if several else one_run(runs, names[0])["run_id"]}
    return opened, replace(request, **chosen)


def newest_of(warehouse: Warehouse, name: str | None) -> list[str]:
    """Return a line that says that the newest run was chosen, if there are several and none was named."""
    number = warehouse.runs().num_rows
    return [f"This is the newest of {number} runs; --run names another."] if number > 1 and not name else []
