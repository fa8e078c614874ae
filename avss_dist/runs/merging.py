"""Merging of the stored shards of a run, block by block, here or on workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Protocol, TypeAlias, TypeVar

from avss_dist.core.errors import RunFailed
from avss_dist.core.values import TableRow
from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS
from avss_dist.stats.layer_stats import (
    LayerStats,
    Merged,
    ShardResult,
    StratumKey,
    combine_blocks,
    merge_stats,
    split_into_blocks,
)
from avss_dist.warehouse.shared import OpenShared
from avss_dist.warehouse.store import Store

S = TypeVar("S")
T = TypeVar("T")
MERGED_HERE = 400  # shards; merging more is distributed to workers

Expected = Mapping[int, str]
"""Content hashes of shards by id, in order."""


class Apply(Protocol):
    """Applies a function to every item, in order. See `runs.local.LocalExecutor.apply`."""

    def __call__(self, function: Callable[[S], T], items: Sequence[S]) -> Iterable[T]:
        """Return the function's values."""


@dataclass
class ShardSummary:
    """Summary of the shards of a run, for its row.

    Attributes:
        layers, model, device: those of the last shard, with the notes of all shards.
        peak_memory_bytes: maximum over shards.
        seconds: sum over shards.
    """

    layers: tuple[str, ...] = ()
    model: TableRow = field(default_factory=dict)
    device: str = ""
    peak_memory_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: ShardResult | ShardSummary) -> None:
        """Add a later shard, or a summary of later shards."""
        notes = dict.fromkeys([*self.model.get("notes", ()), *other.model["notes"]])
        self.layers = other.layers
        self.model = {**other.model, "notes": list(notes)}
        self.device = other.device
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)
        self.seconds += other.seconds


MergedBlock: TypeAlias = tuple[dict[StratumKey, LayerStats], ShardSummary]
"""Statistics of the shards of a block, and the summary of them."""


def merge_partials(
    store: Store, run_id: str, expected: Expected, shared: OpenShared, apply: Apply
) -> tuple[Merged, ShardSummary]:
    """Merge the partials of a run, and summarize its shards.

    Args:
        expected: content hash of every shard, from shard 0.
        shared: opens the warehouse in workers.
        apply: merges blocks on workers, if there are more than `MERGED_HERE` shards.

    Returns:
        Statistics of the run and of its blocks, and the summary.

    Raises:
        RunFailed: a partial is missing or damaged.
    """
    blocks: list[Expected] = []
    for shard_ids in split_into_blocks(len(expected), BOOTSTRAP_BLOCKS):
        blocks.append({shard_id: expected[shard_id] for shard_id in shard_ids})
    from_workers: Iterable[MergedBlock | None] = [None] * len(blocks)
    if len(expected) > MERGED_HERE:
        from_workers = apply(partial(_merge_block_in_worker, shared, run_id), blocks)
    summary = ShardSummary()

    def block_statistics() -> Iterator[Mapping[StratumKey, LayerStats]]:
        for block, merged_block in zip(blocks, from_workers, strict=True):
            if merged_block is None:
                merged_block = _merge_block(store, run_id, block)
            statistics, block_summary = merged_block
            summary.add(block_summary)
            yield statistics

    return combine_blocks(block_statistics()), summary


def _merge_block_in_worker(shared: OpenShared, run_id: str, expected: Expected) -> MergedBlock | None:
    """Return a merged block, or None if this worker does not see the warehouse."""
    store = shared()
    if store is None:
        return None
    return _merge_block(store, run_id, expected)


def _merge_block(store: Store, run_id: str, expected: Expected) -> MergedBlock:
    """Return the merged statistics of the shards of a block, and their summary. One shard is in memory at a time."""
    summary = ShardSummary()

    def shard_statistics() -> Iterator[Mapping[StratumKey, LayerStats]]:
        for shard_id, shard in zip_longest(expected, store.reader.each_shard(run_id, expected)):
            if shard is None or shard.shard_id != shard_id:
                raise RunFailed(
                    f"The partial of shard {shard_id} is damaged or missing.",
                    "Run the same command again: it measures that shard again, and keeps the others.",
                )
            summary.add(shard)
            yield shard.strata

    return merge_stats(shard_statistics()), summary
