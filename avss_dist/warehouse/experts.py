"""Statistics of routed experts in the warehouse, of each shard, and merged; and the files beside a partial."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from avss_dist.errors import RunFailed
from avss_dist.stats.experts import EXPERT_COLUMNS, ExpertStats, merge_experts
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.warehouse.checks import checked_rows
from avss_dist.warehouse.encoding import encode, encode_rows, parse
from avss_dist.warehouse.schema import RunIdentity

if TYPE_CHECKING:
    from avss_dist.warehouse.store import Store

MERGED, OF_SHARDS = "expert_stats", "shard_expert_stats"  # tables


def encode_beside(run: RunIdentity, result: ShardResult) -> Iterator[tuple[str, pa.Buffer]]:
    """The files that a shard has beside its partial, each with its table."""
    if result.rows:
        yield "row_stats", encode_rows(run, result.rows)
    if result.experts is not None:
        columns = _to_columns(run, result.layers, result.experts)
        columns["shard_id"] = [result.shard_id] * len(columns["layer"])
        yield OF_SHARDS, encode(OF_SHARDS, run.run_id, columns)


def write_merged_experts(store: Store, run: RunIdentity, layers: Sequence[str], shard_ids: Iterable[int]) -> None:
    """Merge the files of all shards, in the order of their ids, into one.

    Args:
        layers: module path of every layer, in order.

    Raises:
        RunFailed: one is not there, or damaged.
    """

    def read(shard_id: int) -> dict[int, ExpertStats]:
        path = store.storage.path(OF_SHARDS, run.run_id, f"shard-{shard_id:05d}")
        if (data := store.storage.read(path)) is None:
            raise RunFailed(
                f"The experts of shard {shard_id} were written, and are gone.",
                "Run the same command with --fresh: it measures every shard again.",
            )
        with store.storage.reading(path):
            return to_experts(checked_rows(OF_SHARDS, run.run_id, parse(data)))

    with ThreadPoolExecutor() as pool:
        merged = merge_experts(pool.map(read, sorted(shard_ids)))
    path = store.storage.path(MERGED, run.run_id, MERGED)
    store.storage.write(path, encode(MERGED, run.run_id, _to_columns(run, layers, merged)))


def _to_columns(run: RunIdentity, layers: Sequence[str], experts: Mapping[int, ExpertStats]) -> dict[str, Any]:
    """A row for each layer and expert in order, by column."""
    sizes = {layer: len(stats.routed_tokens) for layer, stats in sorted(experts.items())}
    of = [layer for layer, size in sizes.items() for _ in range(size)]
    columns: dict[str, Any] = {name: [value] * len(of) for name, value in asdict(run).items()}
    columns |= {"layer": of, "layer_name": [layers[layer] for layer in of]}
    columns["depth"] = [(layer + 0.5) / len(layers) for layer in of]
    columns["expert"] = [expert for size in sizes.values() for expert in range(size)]
    for name in EXPERT_COLUMNS:
        parts = [getattr(experts[layer], name) for layer in sizes]
        columns[name] = pa.array(np.concatenate(parts) if parts else np.zeros(0), from_pandas=True)
    return columns


def to_experts(table: pa.Table) -> dict[int, ExpertStats]:
    """The statistics in rows of one run, or of one of its shards, by layer."""
    table = table.sort_by([("layer", "ascending"), ("expert", "ascending")])
    layer = table["layer"].to_numpy()
    columns = {name: table[name].to_numpy() for name in EXPERT_COLUMNS}
    return {
        int(one): ExpertStats(**{name: values[layer == one] for name, values in columns.items()})
        for one in np.unique(layer)
    }
