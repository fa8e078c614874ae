"""Sparsity plans of a run: the measurements that a method needs, the plan, and its storage."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from operator import itemgetter

import numpy as np

from avss_dist.core.text import RedactedURI
from avss_dist.core.values import NewObject, TableRow
from avss_dist.corpus.seen import SPARSITY, SeenText, seen_text
from avss_dist.corpus.shards import Shard
from avss_dist.evaluation.limits import require_partition
from avss_dist.evaluation.planned_tasks import plan_text
from avss_dist.evaluation.session import EvaluationSession, checkpoint_of_run
from avss_dist.planning.sparsity import (
    MEASURED_METHODS,
    READ_TEXT,
    MapSamples,
    MeasuredMaps,
    allocate,
    measured_maps,
    plan_sparsity,
)
from avss_dist.plans.map_plans import SparsityPlan
from avss_dist.plans.seen import seen_by_run
from avss_dist.requests import SparsifyRequest
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.task import Measure, Task
from avss_dist.warehouse.names import SPARSITY_TASK
from avss_dist.warehouse.reader import Warehouse, grouped
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store


def sparsify(request: SparsifyRequest, run: TableRow) -> SparsityPlan:
    """Make a sparsity plan for the checkpoint of a run. Cells that the warehouse has are not measured again.

    Args:
        run: row of ``runs`` of a run that measured the inputs of linear maps (``--sites inputs``).

    Raises:
        AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
    """
    maps = measured_maps(Warehouse(request.warehouse), run)
    seen = [*seen_by_run(run)]
    why: NewObject = {"by": request.method, "target": request.target}
    if request.method in MEASURED_METHODS:
        sparsities = _allocate(request, run, maps, why, seen)
    else:
        sparsities = np.full(len(maps), request.target)
    plan = plan_sparsity(run, maps, sparsities, request.method, why, seen, rule=request.rule)
    _store(request, run, plan)
    if request.output is not None:
        plan.write(request.output)
    return plan


def _allocate(
    request: SparsifyRequest, run: TableRow, maps: MeasuredMaps, why: NewObject, seen: list[SeenText]
) -> Float64:
    """Return the sparsity of each map by a method that measures them.

    Args:
        why: receives the evaluation and other reasons of the allocation.
        seen: receives the text that the method reads, if it reads one.
    """
    method = request.method
    require_partition(
        request.execution.partition,
        lambda info: not info.gang,
        f"has a part of each weight, and {method} needs it whole.",
    )
    checkpoint = checkpoint_of_run(run, trust_remote_code=request.settings.trust_remote_code)
    corpus = RedactedURI(request.corpus or run["corpus"])
    with EvaluationSession.open(request.warehouse, request.settings, request.execution, request.on_event) as session:
        model = session.place(checkpoint, request.settings)
        name = f"{SPARSITY_TASK}{method}"
        shards: list[Shard] = []
        if method in READ_TEXT:
            text = plan_text(checkpoint, corpus.full, model.settings)
            shards += text.shards
            name += f":{corpus}"
            seen.append(seen_text(text, model.settings, SPARSITY))

        def measure(parts: tuple[Measure, ...]) -> MapSamples:
            """Return the samples of each layer and metric, summed over the parts in their order."""
            planned = model.plan(Task(name=name, parts=parts))
            session.run(planned.cells())
            why["evaluation"] = planned.run_id()
            rows = session.store.cells.read(planned.run_id()).sort_by("part").to_pylist()
            sums: dict[tuple[int, str], Float64] = {}
            for place, parts_of_place in grouped(rows, itemgetter("layer", "metric")).items():
                sums[place] = np.sum([row["samples"] for row in parts_of_place], axis=0)
            return sums

        allocation = allocate(method, maps, request.target, shards, measure)
    why.update(allocation.reasons)
    return allocation.sparsities


def _store(request: SparsifyRequest, run: TableRow, plan: SparsityPlan) -> None:
    """Write the maps of a plan into the table ``sparsity``."""
    identity = RunIdentity(run_id=run["run_id"], model=run["model"], revision=run["revision"], family=run["family"])
    key = str(plan.intervention.key.sparsity)
    common = {
        "sparsity_plan": key,
        "method": request.method,
        "target": request.target,
        "rule": plan.rule,
        "weighted": plan.weighted,
        "created_at": datetime.now(UTC),
    }
    rows = [common | asdict(projection) for projection in plan.projections]
    Store(request.warehouse).write_rows("sparsity", identity, rows, key[:20])
