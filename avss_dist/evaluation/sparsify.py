"""Make a sparsity plan: what a method asks of the model, measured by the cells of `evaluate`, and the allocation."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow.compute as pc

from avss_dist.analysis.sparsity_plans import Map, Measured, make_plan, plan_uniform, require_target
from avss_dist.corpus.shards import CorpusPlan
from avss_dist.errors import ConfigError
from avss_dist.evaluation.engine import (
    CellReporter,
    PlannedEvaluation,
    evaluation_options,
    failure,
    measure,
    pinned,
    placed,
    plan_evaluation,
    plan_text,
)
from avss_dist.executors.open import open_executor
from avss_dist.models.checkpoints import resolve
from avss_dist.pruning.selection import PlanError
from avss_dist.registry import PARTITIONS
from avss_dist.settings import SPARSITY_TASK, THRESHOLD, TOP_K
from avss_dist.sparsity.allocate import MOST, along_path, heavy_tail_ratios, knapsack, scaled
from avss_dist.sparsity.plan import SparsityPlan
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.base import Measure, Task
from avss_dist.tasks.block_search import GREEDY, HILL, KS, GreedyBlock, Spectra
from avss_dist.tasks.map_damage import SECOND, MapDamage
from avss_dist.text import RedactedURI
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.store import Store

LEVELS = np.append(np.arange(1, 20) / 20, 0.98)  # sparsities at which `loss` asks for the damage
BASE = 0.05  # TEAL's step, of the largest map of a block


def sparsify(
    warehouse: str,
    run: Mapping[str, Any],
    target: float,
    *,
    method: str,
    corpus: str | None = None,
    skip_sequences: int = 0,
    reporter: CellReporter | None = None,
    rule: str = "all",
    pattern: str | None = None,
    **options: Any,
) -> SparsityPlan:
    """A sparsity plan for the checkpoint of a run that measured ``--site inputs``; nothing is measured twice.

    Args:
        run: its row of ``runs``.
        target: the share of the weights of all linear maps that meet a zero.
        method: see `sparsity.plan.METHODS`.
        corpus: text that ``loss`` and ``teal`` read; the run's own by default.
        skip_sequences: rows at its start that are not read.
        rule, pattern: see `SparsityPlan`.
        options: the fields of ``settings.Settings`` and ``settings.Execution``.

    Raises:
        AvssError: a mistake, or a cell that failed; what was measured is kept.
    """
    require_target(target)
    measured = Measured.of(Warehouse(warehouse), run)
    if pattern is not None or method in ("uniform", "wina", "topp"):
        return plan_uniform(measured, target, method, rule=rule, pattern=pattern)
    rows, evaluation = _measure(warehouse, measured, method, corpus or run["corpus"], skip_sequences, reporter, options)
    sparsities, more = _ALLOCATIONS[method](measured, target, rows)
    why = {"by": method, "target": target, "evaluation": evaluation, **more}
    return make_plan(measured, sparsities, TOP_K if method == "acttail" else THRESHOLD, why, rule=rule)


Rows = Mapping[tuple[int, str], Float64]
"""The samples of each layer and metric, summed over the parts that have it."""


def _measure(
    warehouse: str,
    measured: Measured,
    method: str,
    corpus: str,
    skip_sequences: int,
    reporter: CellReporter | None,
    options: dict[str, Any],
) -> tuple[Rows, str]:
    settings, execution = evaluation_options(options)
    _require_weights(execution.partition, method)
    checkpoint = resolve(measured.run["model"], trust_remote_code=settings.trust_remote_code)
    if checkpoint.revision != measured.run["revision"]:
        raise PlanError(f"{checkpoint.name} has changed since {measured.run['run_id']}.", "Score it again.")
    store = Store(warehouse)
    with closing(open_executor(execution, settings)) as executor:
        fixed = pinned(settings, checkpoint, executor.device)
        placement = placed(checkpoint, fixed, execution, executor)
        _require_weights(placement.partition, method)
        name = f"{SPARSITY_TASK}{method}"
        if method == "acttail":
            parts: tuple[Measure, ...] = tuple(Spectra(layer) for layer in sorted({m.layer for m in measured.maps}))
        else:
            text = plan_text(checkpoint, corpus, fixed, skip_sequences=skip_sequences)
            name, parts = f"{name}:{RedactedURI(corpus)}", _PARTS[method](measured, text)
        planned = plan_evaluation(checkpoint, Task(name=name, parts=parts), fixed, placement)
        failed = measure(planned.cells([()]), store, executor, reporter, fresh=execution.fresh)
    if failed:
        raise failure(failed)
    return _rows(store, planned), planned.run_id


def _require_weights(partition: str, method: str) -> None:
    """Refuse a partition in which a process has no whole weight.

    Raises:
        ConfigError: the message names those in which one has.
    """
    if partition != "auto" and not PARTITIONS[partition].changes_weights:
        able = ", ".join(name for name, info in PARTITIONS.items() if info.changes_weights)
        raise ConfigError(
            f"`partition` {partition} has a part of each weight, and {method} needs it whole.", f"Use {able}."
        )


def _damage_parts(measured: Measured, text: CorpusPlan) -> tuple[Measure, ...]:
    thresholds = {(one.layer, one.path): tuple(one.thresholds(LEVELS).tolist()) for one in measured.maps}
    return tuple(MapDamage(shard=shard, thresholds=thresholds) for shard in text.shards)


def _greedy_parts(measured: Measured, text: CorpusPlan) -> tuple[Measure, ...]:
    by_layer: dict[int, list[Map]] = {}
    for one in measured.maps:
        by_layer.setdefault(one.layer, []).append(one)
    return tuple(_greedy_block(layer, maps, text) for layer, maps in by_layer.items())


def _greedy_block(layer: int, maps: list[Map], text: CorpusPlan) -> GreedyBlock:
    largest = max(one.weights for one in maps)
    steps = {one.path: BASE * largest / one.weights for one in maps}
    thresholds = {
        one.path: tuple(one.thresholds(np.arange(steps[one.path], 1 - 1e-9, steps[one.path])).tolist()) for one in maps
    }
    sizes = {one.path: one.weights for one in maps}
    return GreedyBlock(layer=layer, shards=tuple(text.shards), thresholds=thresholds, steps=steps, sizes=sizes)


_PARTS = {"loss": _damage_parts, "teal": _greedy_parts}


def _rows(store: Store, planned: PlannedEvaluation) -> Rows:
    found: dict[tuple[int, str], Float64] = {}
    cells = store.table("cells", where=pc.field("run_id") == planned.run_id).to_pylist()
    for row in sorted(cells, key=lambda row: row["part"]):
        key = row["layer"], row["metric"]
        samples = np.asarray(row["samples"], np.float64)
        found[key] = found[key] + samples if key in found else samples
    return found


def _by_damage(measured: Measured, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    damage = np.array([rows[one.layer, f"{SECOND}{one.path}"] for one in measured.maps])
    return knapsack(damage, LEVELS, measured.sizes, target), {}


def _by_paths(measured: Measured, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """Each block at the target, between two steps of its path."""
    found = np.zeros(len(measured.maps))
    layers = np.array([one.layer for one in measured.maps])
    for layer in dict.fromkeys(layers.tolist()):
        mine = np.flatnonzero(layers == layer)
        path = np.stack([rows[layer, f"{GREEDY}{measured.maps[i].path}"] for i in mine], axis=1)
        found[mine] = along_path(path, measured.sizes[mine], target)
    return found, {"base_step": BASE}


def _by_tails(measured: Measured, target: float, rows: Rows) -> tuple[Float64, dict[str, Any]]:
    """In proportion to what the heavy tail of each weight lets it bear."""
    exponents = np.array([rows[one.layer, f"{HILL}{one.path}"][0] for one in measured.maps])
    other = np.array([rows[one.layer, f"{KS}{one.path}"][0] for one in measured.maps])
    read = "the mapping of AlphaPruning, which is read as ActTail's: its paper's is not at hand"
    more = {"reading": read, "exponents": "Hill, upper half", "ks_median": round(float(np.median(other)), 4)}
    return scaled(heavy_tail_ratios(exponents), measured.sizes, target, MOST), more


_ALLOCATIONS = {"loss": _by_damage, "teal": _by_paths, "acttail": _by_tails}
