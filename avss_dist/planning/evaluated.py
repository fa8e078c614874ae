"""Lines on the evaluations of a model without layers that a warehouse has."""

from __future__ import annotations

from operator import itemgetter

import pyarrow.compute as pc

from avss_dist.analysis.verdict import describe_metric, primary_metric, shown_value
from avss_dist.core.intervention import InterventionKey, Removals, stored_removals
from avss_dist.core.values import TableRow
from avss_dist.tasks.results import Retention, combine
from avss_dist.warehouse.checks import settings_of
from avss_dist.warehouse.names import SEARCH, describe_task
from avss_dist.warehouse.reader import Warehouse, grouped

OTHER_CHANGES = ("layer", "patch", "sparsity_plan", "factor", "rounding")
"""Columns of ``evaluations`` that tell changes of a model besides layers that are left out."""


def evaluated_lines(warehouse: Warehouse, run: TableRow, removed: Removals) -> tuple[str, ...]:
    """Return a line for each task that the model was evaluated on without these layers, beside the whole model.

    It has the rows that were read of a text, and the retention with its interval, where the cells are stored.
    """
    rows = warehouse.table("evaluations", where=pc.field("revision") == run["revision"]).to_pylist()
    by_task = grouped([row for row in rows if _only_removes_layers(row)], itemgetter("run_id", "task"))
    lines: dict[str, None] = {}
    for group in by_task.values():
        metric = primary_metric(group)
        by_removal = {stored_removals(row): row for row in group if row["metric"] == metric}
        if removed in by_removal:
            lines[_evaluated_line(warehouse, by_removal[removed], by_removal.get(()))] = None
    return tuple(lines)


def _only_removes_layers(evaluation: TableRow) -> bool:
    """Whether a row of ``evaluations`` is of a model that is whole but for layers, and not of a search."""
    if evaluation["task"].startswith(SEARCH):
        return False
    return all(evaluation[name] is None for name in OTHER_CHANGES)


def _evaluated_line(warehouse: Warehouse, row: TableRow, whole: TableRow | None) -> str:
    """Return the result of an evaluation without layers as a sentence.

    Args:
        row: row of ``evaluations`` without the layers.
        whole: that of the whole model, if it was evaluated too.
    """
    skipped = settings_of(row).get("skip_sequences", 0)
    task = describe_task(row["task"], skipped, row["num_samples"])
    line = f"{task}: {describe_metric(row['metric'])} {shown_value(row)}"
    if whole is not None:
        line += f", {shown_value(whole)} of the whole model"
        retention = _retention(warehouse, row)
        if retention is not None:
            line += f": {retention.describe()}"
    return f"{line}."


def _retention(warehouse: Warehouse, evaluation: TableRow) -> Retention | None:
    """Return what is kept of a metric without the layers of an evaluation, from its cells; None without cells."""
    of_run = pc.field("run_id") == evaluation["run_id"]
    of_task = pc.field("task") == evaluation["task"]
    of_metric = pc.field("metric") == evaluation["metric"]
    rows = warehouse.table("cells", where=of_run & of_task & of_metric).to_pylist()
    num_parts = len({row["part"] for row in rows})
    results = {result.intervention: result for result in combine(rows, num_parts)}
    before = results.get(InterventionKey())
    after = results.get(InterventionKey(removed=stored_removals(evaluation)))
    if before is None or after is None:
        return None
    return Retention.of(before, after)
