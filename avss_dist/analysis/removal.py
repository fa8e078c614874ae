"""Measurements of a model without some of its layers: block distances, and the best removed set of each size."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from avss_dist.analysis.verdict import describe_task, primary_metric
from avss_dist.core.intervention import decode_removals, describe_removed, size_removed
from avss_dist.core.names import REPAIR, ROW_START, SEARCH, SUBLAYER_LOSS
from avss_dist.core.registry import BLOCK_DISTANCE, MEASURED, SCORES
from avss_dist.stats.retention import retention_of
from avss_dist.warehouse.reader import Warehouse

OF_EVERY_LAYER = tuple({*(SCORES[name].task for name in MEASURED), SUBLAYER_LOSS, SEARCH})
"""Tasks that measure single layers, or candidate sets of a search, rather than a pruned model."""
Row = Mapping[str, Any]  # of the table `evaluations`


@dataclass(frozen=True, kw_only=True)
class BlockDistance:
    """Distance between the hidden states before and after a block of consecutive layers.

    Attributes:
        start: index of the first layer.
        length: number of layers.
        distance: mean angle, in units of pi radians.
    """

    start: int
    length: int
    distance: float


@dataclass(frozen=True, kw_only=True)
class RemovedSet:
    """A set of removed layers and the retention of the model without it.

    Attributes:
        series: name of the task, with the repair if there was one.
        dropped: the removed layers, in words.
        size: number of layers. A sublayer counts as half a layer.
        retention: retention of the task's primary metric.
    """

    series: str
    dropped: str
    size: float
    retention: float


@dataclass(frozen=True, kw_only=True)
class WithoutLayers:
    """Measurements of a checkpoint without some of its layers.

    Attributes:
        blocks: block distances, ordered by first layer and length.
        sets: the best set of each size, for every task and repair.
    """

    blocks: tuple[BlockDistance, ...] = ()
    sets: tuple[RemovedSet, ...] = ()


def without_layers(warehouse: Warehouse, runs: Sequence[Row]) -> list[WithoutLayers]:
    """Return the measurements of each run's checkpoint without some of its layers.

    Args:
        runs: rows of ``runs``.
    """
    revisions = {run["revision"] for run in runs} - {None}
    where = pc.field("revision").isin(pa.array(sorted(revisions), pa.string()))
    by_revision: dict[str, list[Row]] = {revision: [] for revision in revisions}
    for row in warehouse.table("evaluations", where=where).to_pylist() if revisions else ():
        by_revision[row["revision"]].append(row)
    measured = {
        revision: WithoutLayers(blocks=tuple(_blocks(rows)), sets=tuple(_best_sets(rows)))
        for revision, rows in by_revision.items()
    }
    return [measured.get(run["revision"], WithoutLayers()) for run in runs]


def _blocks(rows: Sequence[Row]) -> Iterator[BlockDistance]:
    measured = [row for row in rows if row["metric"] == BLOCK_DISTANCE and isfinite(row["value"])]
    newest = max(((row["created_at"], row["run_id"]) for row in measured), default=None)
    by_block = {(row["drop"][0], len(row["drop"])): row for row in measured if newest and row["run_id"] == newest[1]}
    for (start, length), row in sorted(by_block.items()):
        yield BlockDistance(start=start, length=length, distance=row["value"])


def _best_sets(rows: Sequence[Row]) -> Iterator[RemovedSet]:
    """Yield the best removed set of each size, for every task and repair."""
    fits = [row for row in rows if row["patch"] and row["task"].startswith(REPAIR)]
    repairs = {row["patch"]: row["task"].split(":")[1] for row in fits}
    by_task: dict[str, dict[str, list[Row]]] = {}
    for row in filter(_evaluates_removal, rows):
        by_task.setdefault(row["task"], {}).setdefault(row["run_id"], []).append(row)
    for task, evaluations in by_task.items():
        sets = sorted(_sets(task, max(evaluations.values(), key=len), repairs), key=lambda removed: removed.retention)
        best = {(removed.series, removed.size): removed for removed in sets}
        yield from (best[key] for key in sorted(best))


def _evaluates_removal(row: Row) -> bool:
    """Whether a row evaluates a model that is changed only by the removal of layers and possibly a repair."""
    changed_otherwise = row["factor"] or any(row[name] is not None for name in ("layer", "sparsity_plan", "rounding"))
    return not changed_otherwise and not row["task"].startswith((*OF_EVERY_LAYER, REPAIR, ROW_START))


def _sets(task: str, rows: Sequence[Row], repairs: Mapping[str, str]) -> Iterator[RemovedSet]:
    """Yield every set of layers that was removed in one evaluation."""
    metric = primary_metric(rows)
    rows = [row for row in rows if row["metric"] == metric]
    for whole in (row["value"] for row in rows if not row["drop"]):
        for row in (row for row in rows if row["drop"]):
            share = float(retention_of(metric, np.array(whole), np.array(row["value"])))
            repair = f", repaired by {repairs.get(row['patch'], 'a patch')}" if row["patch"] else ""
            if isfinite(share):
                removed = decode_removals(row["drop"])
                yield RemovedSet(
                    series=f"{describe_task(task)}{repair}",
                    dropped=describe_removed(removed),
                    size=size_removed(removed),
                    retention=share,
                )
