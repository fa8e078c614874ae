"""What the report's page knows of a model without some of its layers: block distances, and what is kept by share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.verdict import primary_metric
from avss_dist.intervention import decode_removals, describe_removed, size_removed
from avss_dist.names import REPAIR, ROW_START, SEARCH, SUBLAYER_LOSS
from avss_dist.registry import BLOCK_DISTANCE, MEASURED, SCORES
from avss_dist.stats.retention import kept
from avss_dist.text import basename

if TYPE_CHECKING:
    from avss_dist.warehouse.reader import Warehouse

OF_EVERY_LAYER = tuple({*(SCORES[name].task for name in MEASURED), SUBLAYER_LOSS, SEARCH})
"""Tasks that say what single layers do, or sets on the text of a search: nothing that a model is judged by."""
DIGITS = 4
Row = Mapping[str, Any]  # of the table `evaluations`


def without_layers(warehouse: Warehouse, runs: Sequence[Row]) -> list[dict[str, list[dict[str, Any]]]]:
    """Of each run's checkpoint, ready for JSON.

    Args:
        runs: rows of ``runs``.

    Returns:
        ``blocks``: ``start``, ``length`` and ``distance`` of every run of neighbours, in this order; ``kept``: of every
        task and repair, the best set of each size that was evaluated.
    """
    revisions = {run["revision"] for run in runs} - {None}
    where = pc.field("revision").isin(pa.array(sorted(revisions), pa.string()))
    by_revision: dict[str, list[Row]] = {revision: [] for revision in revisions}
    for row in warehouse.table("evaluations", where=where).to_pylist() if revisions else ():
        by_revision[row["revision"]].append(row)
    found = {
        revision: {"blocks": list(_blocks(rows)), "kept": list(_curves(rows))} for revision, rows in by_revision.items()
    }
    nothing: dict[str, list[dict[str, Any]]] = {"blocks": [], "kept": []}
    return [_of_run(found.get(run["revision"], nothing), run["num_layers"]) for run in runs]


def _of_run(found: Mapping[str, list[dict[str, Any]]], layers: int) -> dict[str, list[dict[str, Any]]]:
    """The same with shares of so many layers."""
    return {**found, "kept": [{**one, "share": _short(one["size"] / layers)} for one in found["kept"]]}


def _blocks(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    measured = [row for row in rows if row["metric"] == BLOCK_DISTANCE and isfinite(row["value"])]
    newest = max(((row["created_at"], row["run_id"]) for row in measured), default=None)
    of = {(row["drop"][0], len(row["drop"])): row for row in measured if newest and row["run_id"] == newest[1]}
    for (start, length), row in sorted(of.items()):
        yield {"start": start, "length": length, "distance": _short(row["value"])}


def _curves(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Of every task and repair, the best set of each size."""
    fits = [row for row in rows if row["patch"] and row["task"].startswith(REPAIR)]
    repairs = {row["patch"]: row["task"].split(":")[1] for row in fits}
    rows = [row for row in rows if row["layer"] is None and not row["factor"] and row["sparsity_plan"] is None]
    judged = [row for row in rows if not row["task"].startswith((*OF_EVERY_LAYER, REPAIR, ROW_START))]
    for task in dict.fromkeys(row["task"] for row in judged):
        evaluations: dict[str, list[Row]] = {}
        for row in judged:
            if row["task"] == task:
                evaluations.setdefault(row["run_id"], []).append(row)
        yield from _curve(task, max(evaluations.values(), key=len), repairs)


def _curve(task: str, rows: Sequence[Row], repairs: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    points = sorted(_points(task, rows, repairs), key=lambda point: float(point["kept"]))
    best = {(point["series"], point["size"]): point for point in points}
    yield from (point for _, point in sorted(best.items()))


def _points(task: str, rows: Sequence[Row], repairs: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Of every set of layers: the task and the repair, its size, and what is kept."""
    metric = primary_metric(rows)
    rows = [row for row in rows if row["metric"] == metric]
    for whole in (row["value"] for row in rows if not row["drop"]):
        for row in (row for row in rows if row["drop"]):
            share = float(kept(metric, np.array(whole), np.array(row["value"])))
            repair = f", repaired by {repairs.get(row['patch'], 'a patch')}" if row["patch"] else ""
            if isfinite(share):
                removed = decode_removals(row["drop"])
                of = {"series": f"{named_task(task)}{repair}", "dropped": describe_removed(removed)}
                yield {**of, "size": size_removed(removed), "kept": _short(share)}


def named_task(task: str) -> str:
    """A task as people read it: without the folders of its text."""
    name, colon, rest = task.partition(":")
    return f"{name}: {basename(rest)}" if colon else basename(task)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
