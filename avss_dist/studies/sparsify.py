"""Sparsity plans of a run: measurements for a method, allocation, and storage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from operator import itemgetter
from typing import Any

import numpy as np

from avss_dist.analysis.thresholds import quantiles_of
from avss_dist.core.intervention import THRESHOLD, TOP_K
from avss_dist.core.text import RedactedURI
from avss_dist.corpus.seen import SPARSITY, seen_text
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.evaluation.session import EvaluationSession, checkpoint_of_run, require_partition
from avss_dist.evaluation.tasks import plan_text
from avss_dist.planning.layers import map_sizes, measured_maps, plan_sparsity
from avss_dist.plans.budget import MAX_SPARSITY, heavy_tail_ratios, interpolate_path, knapsack, proportional
from avss_dist.plans.map_plans import MapPlan, SparsityPlan
from avss_dist.plans.seen import seen_by_run
from avss_dist.requests import SparsifyRequest
from avss_dist.stats.layer_stats import Float64, LayerStats
from avss_dist.tasks.block_search import GREEDY, HILL, GreedyBlock, Spectra
from avss_dist.tasks.map_damage import SECOND, MapDamage
from avss_dist.tasks.task import Measure, Task
from avss_dist.warehouse.names import SPARSITY_TASK
from avss_dist.warehouse.reader import Warehouse, grouped
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store

LEVELS = np.append(np.arange(1, 20) / 20, 0.98)  # sparsities at which `loss` measures the damage
READ_TEXT = ("loss", "teal")
BASE = 0.05  # TEAL's step for the largest map of a block

Rows = Mapping[tuple[int, str], Float64]
"""Samples by layer and metric, summed over the parts of a task."""
Measurement = Callable[[tuple[Measure, ...]], Rows]
"""Function that measures the parts of a task."""


def sparsify(request: SparsifyRequest, run: Mapping[str, Any]) -> SparsityPlan:
    """Make a sparsity plan for the checkpoint of a run. Cells that the warehouse has are not measured again.

    Args:
        run: row of ``runs`` of a run that measured the inputs of linear maps (``--sites inputs``).

    Raises:
        AvssError: a mistake, or a cell that failed. Measured cells remain in the warehouse.
    """
    target = request.target
    method = request.method
    maps = measured_maps(Warehouse(request.warehouse), run)
    seen = [*seen_by_run(run)]
    why: dict[str, Any] = {"by": method, "target": target}
    if method not in _ALLOCATIONS:  # the counts of the run are enough
        sparsities = np.full(len(maps), target)
    else:
        require_partition(
            request.execution.partition,
            lambda info: not info.gang,
            f"has a part of each weight, and {method} needs it whole.",
        )
        checkpoint = checkpoint_of_run(run, trust_remote_code=request.settings.trust_remote_code)
        corpus = RedactedURI(request.corpus or run["corpus"])
        with EvaluationSession.open(
            request.warehouse, request.settings, request.execution, request.on_event
        ) as session:
            model = session.place(checkpoint, request.settings)
            name = f"{SPARSITY_TASK}{method}"
            text = None
            if method in READ_TEXT:
                text = plan_text(checkpoint, corpus.full, model.settings)
                name += f":{corpus}"
                seen.append(seen_text(text, model.settings, SPARSITY))

            def measure(parts: tuple[Measure, ...]) -> Rows:
                """Return the samples of each layer and metric, summed over the parts in their order."""
                planned = model.plan(Task(name=name, parts=parts))
                session.run(planned.cells())
                why["evaluation"] = planned.run_id()
                rows = session.store.cells(planned.run_id()).sort_by("part").to_pylist()
                sums: dict[tuple[int, str], Float64] = {}
                for place, parts_of_place in grouped(rows, itemgetter("layer", "metric")).items():
                    sums[place] = np.sum([row["samples"] for row in parts_of_place], axis=0)
                return sums

            sparsities, reasons = _ALLOCATIONS[method](maps, target, text, measure)
        why |= reasons
    by = TOP_K if method in ("acttail", "wina") else THRESHOLD  # the largest inputs of each token, or of all
    plan = plan_sparsity(run, maps, sparsities, by, why, seen, rule=request.rule, weighted=method == "wina")
    identity = RunIdentity(run_id=run["run_id"], model=run["model"], revision=run["revision"], family=run["family"])
    key = str(plan.intervention.key.sparsity)
    common = {
        "sparsity_plan": key,
        "method": method,
        "target": target,
        "rule": plan.rule,
        "weighted": plan.weighted,
        "created_at": datetime.now(UTC),
    }
    rows = [common | asdict(projection) for projection in plan.projections]
    Store(request.warehouse).write_rows("sparsity", identity, rows, key[:20])
    if request.output is not None:
        plan.write(request.output)
    return plan


Maps = Mapping[MapPlan, LayerStats]
"""Linear maps of a run, with the statistics of their inputs."""
Allocation = tuple[Float64, dict[str, Any]]
"""Sparsity of each map, float64[maps], and reasons for the plan."""


def _by_damage(maps: Maps, target: float, text: CorpusPlan, measure: Measurement) -> Allocation:
    """Return the sparsities with the least damage."""
    thresholds = {(map_.layer, map_.map): _thresholds(inputs, LEVELS) for map_, inputs in maps.items()}
    rows = measure(tuple(MapDamage(shard=shard, thresholds=thresholds) for shard in text.shards))
    damage = np.array([rows[map_.layer, f"{SECOND}:{map_.map}"] for map_ in maps])
    return knapsack(damage, LEVELS, map_sizes(maps), target), {}


def _thresholds(inputs: LayerStats, levels: Float64) -> tuple[float, ...]:
    """Return the thresholds under which shares of the inputs of a linear map lie.

    Args:
        levels: shares, float64[levels].
    """
    thresholds, _, _ = quantiles_of(inputs, levels)
    return tuple(thresholds.tolist())


def _by_paths(maps: Maps, target: float, text: CorpusPlan, measure: Measurement) -> Allocation:
    """Return sparsities with which each block meets the target, interpolated between two steps of its path."""
    blocks: dict[int, list[int]] = {}  # places of the maps of each layer
    for place, map_ in enumerate(maps):
        blocks.setdefault(map_.layer, []).append(place)
    every_map = list(maps)
    parts = []
    for layer, block in blocks.items():
        members = [every_map[place] for place in block]
        weights = {map_.map: map_.weights for map_ in members}
        largest = max(weights.values())
        steps = {path: BASE * largest / number for path, number in weights.items()}
        thresholds = {}
        for map_ in members:
            levels = np.arange(steps[map_.map], 1 - 1e-9, steps[map_.map])
            thresholds[map_.map] = _thresholds(maps[map_], levels)
        parts.append(
            GreedyBlock(layer=layer, shards=tuple(text.shards), thresholds=thresholds, steps=steps, sizes=weights)
        )
    rows = measure(tuple(parts))
    sizes = map_sizes(maps)
    sparsities = np.zeros(len(maps))
    for layer, block in blocks.items():
        path = np.stack([rows[layer, f"{GREEDY}{every_map[place].map}"] for place in block], axis=1)
        sparsities[block] = interpolate_path(path, sizes[block], target)
    return sparsities, {"base_step": BASE}


def _by_tails(maps: Maps, target: float, _text: CorpusPlan | None, measure: Measurement) -> Allocation:
    """Return sparsities in proportion to ratios that depend on the heavy tail of each weight's spectrum."""
    rows = measure(tuple(Spectra(layer) for layer in sorted({map_.layer for map_ in maps})))
    exponents = np.array([rows[map_.layer, f"{HILL}{map_.map}"][0] for map_ in maps])
    reasons = {
        "reading": "the mapping of AlphaPruning, which is read as ActTail's: its paper's is not at hand",
        "exponents": "Hill, upper half",
    }
    return proportional(heavy_tail_ratios(exponents), map_sizes(maps), target, MAX_SPARSITY), reasons


_ALLOCATIONS: Mapping[str, Callable[..., Allocation]] = {"loss": _by_damage, "teal": _by_paths, "acttail": _by_tails}
