"""Warehouses for the report's page, written without a model: real statistics of random activations, really scored."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from avss_dist.core.sites import SITES
from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.stats.catalog import BASELINES
from avss_dist.stats.layer_stats import LayerStats
from avss_dist.warehouse.reader import Warehouse
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store
from support.oracle import oracle_stats
from support.warehouses import identity_of, run_row, write_measured

UNITS = 16
SHARDS = 8
SHAPE = (2, 8)  # sequences and tokens of a shard


def measured(
    layers: int, seed: int, shards: int, sites: Sequence[str], still: int | None
) -> list[dict[tuple[int, str], LayerStats]]:
    """Statistics by shard of a residual stream that grows with depth, jumps in one layer, and rests in ``still``."""
    rng = np.random.default_rng(seed)
    mask = np.ones(SHAPE, bool)
    grid = np.array(THRESHOLDS)
    stats_of_shards = []
    for _ in range(shards):
        x = rng.normal(size=(*SHAPE, UNITS))
        stats = {}
        for layer in range(layers):
            scale = 0.1 + 0.1 * rng.random()
            if layer == layers // 2:
                scale += 1
            update = rng.normal(scale=scale, size=x.shape)
            if layer == still:
                update = update * 0.0
            before = x
            x = before + update
            stats[layer, "block"] = oracle_stats(x, mask, grid, units=True, before=before)
            stats[layer, "update"] = oracle_stats(update, mask, grid, units=True)
            stats[layer, "attention"] = oracle_stats(update * rng.random(x.shape), mask, grid)
            stats[layer, "mlp"] = oracle_stats(update * rng.random(x.shape) ** 3, mask, grid)
            stats[layer, "neuron"] = oracle_stats(np.maximum(update, 0), mask, grid)
        stats_of_shards.append({key: state for key, state in stats.items() if key[1] in sites})
    return stats_of_shards


ABOUT: dict[str, Any] = {
    "family": "llama",
    "dtype": "bfloat16",
    "corpus": "builtin:pydoc",
    "revision": None,
    "created_at": datetime(2026, 1, 2, tzinfo=UTC),
    "num_tokens": 64,
    "tokens_per_second": 1234.5,
    "settings": "{}",
}


def write_run(
    warehouse: Warehouse,
    name: str,
    layers: int,
    seed: int = 0,
    *,
    shards: int = SHARDS,
    sites: Sequence[str] = SITES,
    still: int | None = None,
    **row: Any,
) -> str:
    """Measure, score and commit a run; its id."""
    run_id = f"{name}-0123456789"
    values = {**ABOUT, "model": f"org/{name}", **row}
    write_measured(Path(warehouse.root), run_id, measured(layers, seed, shards, sites, still), layers, **values)
    return run_id


def write_removals(warehouse: Warehouse, run_id: str, revision: str, layers: int) -> None:
    """Write what `avss ablate --damage`, `avss ablate` and `avss shrink --keep` find out about a run's checkpoint."""
    store = Store(warehouse.root)
    rng = np.random.default_rng(5)
    common = {"created_at": datetime(2026, 1, 3, tzinfo=UTC), "settings": "{}", "num_samples": 4, "stderr": 0.0}
    common |= {"layer": None, "patch": None, "drop_parts": [], "versions": {}, "seconds": 1.0}
    damage = []
    for start, stop in combinations(range(layers + 1), 2):
        place = {"drop": [*range(start, stop)], "layer": start}
        damage.append({"task": "damage:a.txt", "metric": "block_distance", **place, "value": rng.random()})
    loss = {"task": "ablation:a.txt", "metric": "loss"}
    losses = [{**loss, "drop": [], "value": 3.0}]
    for layer in range(layers):
        losses.append({**loss, "drop": [layer], "layer": layer, "value": 3.0 + 0.1 * layer})
    fit = {"task": "repair:refit:a.txt", "metric": "missing", "value": 0.1}
    fits = [{**fit, "drop": [2], "patch": "hash1"}, {**fit, "drop": [1, 2], "patch": "hash2"}]
    held_out = {"task": "perplexity:texts/a.txt", "metric": "loss"}
    evaluated = [
        {**held_out, "drop": [], "value": 3.0},
        {**held_out, "drop": [2], "value": 3.2},
        {**held_out, "drop": [1], "value": 3.3},
        {**held_out, "drop": [1, 2], "value": 3.5},
        {**held_out, "drop": [2], "patch": "hash1", "value": 3.02},
        {**held_out, "drop": [1, 2], "patch": "hash2", "value": 3.1},
    ]
    for name, rows in (("damage", damage), ("losses", losses), ("fits", fits), ("kept", evaluated)):
        identity = RunIdentity(run_id=f"{run_id}-{name}", model="org/alpha", revision=revision, family="llama")
        store.write_rows("evaluations", identity, [common | row for row in rows])


def write_failed(warehouse: Warehouse, name: str, error: str) -> str:
    """Write a run that failed before it measured anything; its id."""
    run_id = f"{name}-0123456789"
    failed = {"run_id": run_id, "status": "failed", "error": error, "model": f"org/{name}"}
    Store(warehouse.root).write_run({**failed, "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=1)})
    return run_id


def write_many(root: Path, runs: int, layers: int) -> Warehouse:
    """A warehouse of many runs: one that is measured, and others like it, each with numbers of its own by layer."""
    warehouse = Warehouse(root)
    write_run(warehouse, "measured", layers)
    rows = warehouse.table("scores").drop_columns(["run_id", "model", "revision", "family"]).to_pylist()
    scaled = ("variance", "near_zero_count", "sparsity", "avss_smoothed", "avss_low", "avss_high", *BASELINES)
    rng = np.random.default_rng(0)
    for run in range(1, runs):
        factors = rng.lognormal(size=(layers, len(SITES), len(scaled)))
        scores = []
        for row in rows:
            scale = factors[row["layer"], SITES.index(row["site"])]
            changed = {}
            for name, factor in zip(scaled, scale.tolist(), strict=True):
                if row[name]:
                    changed[name] = row[name] * factor
            scores.append(row | changed)
        about = run_row(f"model-{run:02d}-0123456789", num_layers=layers, **ABOUT)
        Store(root).write_rows("scores", identity_of(about), scores)
        Store(root).write_run(about)
    return warehouse
