"""Warehouses for the report's page, written without a model: real statistics of random activations, really scored."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
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
    found = []
    for _ in range(shards):
        x = rng.normal(size=(*SHAPE, UNITS))
        stats = {}
        for layer in range(layers):
            update = rng.normal(scale=0.1 + 0.1 * rng.random() + (layer == layers // 2), size=x.shape) * (
                layer != still
            )
            before, x = x, x + update
            stats[layer, "block"] = oracle_stats(x, mask, grid, units=True, before=before)
            stats[layer, "update"] = oracle_stats(update, mask, grid, units=True)
            stats[layer, "attention"] = oracle_stats(update * rng.random(x.shape), mask, grid)
            stats[layer, "mlp"] = oracle_stats(update * rng.random(x.shape) ** 3, mask, grid)
            stats[layer, "neuron"] = oracle_stats(np.maximum(update, 0), mask, grid)
        found.append({key: state for key, state in stats.items() if key[1] in sites})
    return found


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
    common |= {"layer": None, "patch": None, "versions": {}, "seconds": 1.0}
    blocks = [tuple(range(i, j)) for i in range(layers) for j in range(i + 1, layers + 1)]
    rows = [
        {
            "task": "damage:a.txt",
            "metric": "block_distance",
            "drop": [*block],
            "drop_parts": [],
            "layer": block[0],
            "value": value,
        }
        for block, value in zip(blocks, rng.random(len(blocks)).tolist(), strict=True)
    ]
    losses = [
        {
            "task": "ablation:a.txt",
            "metric": "loss",
            "drop": drop,
            "drop_parts": [],
            "layer": drop[0] if drop else None,
            "value": 3.0 + rise,
        }
        for drop, rise in (([], 0.0), *(([layer], 0.1 * layer) for layer in range(layers)))
    ]
    fits = [
        {
            "task": "repair:refit:a.txt",
            "metric": "missing",
            "drop": drop,
            "drop_parts": [],
            "patch": f"hash{len(drop)}",
            "value": 0.1,
        }
        for drop in ([2], [1, 2])
    ]
    kept = [
        {
            "task": "perplexity:texts/a.txt",
            "metric": "loss",
            "drop": drop,
            "drop_parts": [],
            "patch": patch,
            "value": 3.0 + rise,
        }
        for drop, patch, rise in (
            *(([], None, 0.0), ([2], None, 0.2), ([1], None, 0.3), ([1, 2], None, 0.5)),
            *(([2], "hash1", 0.02), ([1, 2], "hash2", 0.1)),
        )
    ]
    for name, some in (("damage", rows), ("losses", losses), ("fits", fits), ("kept", kept)):
        of = RunIdentity(run_id=f"{run_id}-{name}", model="org/alpha", revision=revision, family="llama")
        store.write_rows("evaluations", of, [common | row for row in some])


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
            scores.append(
                row | {name: row[name] and row[name] * f for name, f in zip(scaled, scale.tolist(), strict=True)}
            )
        about = run_row(f"model-{run:02d}-0123456789", num_layers=layers, **ABOUT)
        Store(root).write_rows("scores", identity_of(about), scores)
        Store(root).write_run(about)
    return warehouse
