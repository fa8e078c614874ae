"""Merging of the partials of a run, block by block, in this process or by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from avss_dist.core.errors import RunFailed
from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.stats.merging import Block, Merged, combine_blocks, merge_block, split_into_blocks
from avss_dist.warehouse.store import SharedWarehouse, Store

MERGED_HERE = 400  # shards; merging more is distributed to workers

Expected = Mapping[int, str]
"""Content hashes of shards by id, in order."""
Apply = Callable[[Callable[[Expected], Any], Sequence[Expected]], Iterable[Any]]
"""Applies a function to every item, in order. See `executors.interface.Executor.apply`."""


@dataclass
class ShardSummary:
    """Summary of the shards of a run, for its row.

    Attributes:
        layers, model, device: those of the last shard, with the notes of all shards.
        peak_memory_bytes: maximum over shards.
        seconds: sum over shards.
    """

    layers: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    peak_memory_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: ShardResult | ShardSummary) -> None:
        """Add a later shard, or a summary of later shards."""
        notes = list(dict.fromkeys([*self.model.get("notes", ()), *other.model["notes"]]))
        self.layers, self.model, self.device = other.layers, {**other.model, "notes": notes}, other.device
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)
        self.seconds += other.seconds


@dataclass(frozen=True)
class MergedPartials:
    """Merged partials of a block, and their summary."""

    block: Block
    summary: ShardSummary


def merge_partials(
    store: Store, shared: SharedWarehouse | None, run_id: str, expected: Expected, apply: Apply | None
) -> tuple[Merged, ShardSummary]:
    """Merge the partials of a run, and summarize its shards.

    Args:
        expected: content hash of every shard, from shard 0.
        apply: merges blocks on workers; None merges all in this process.

    Returns:
        Statistics of the run and of its blocks, and the summary.

    Raises:
        RunFailed: a partial is missing or damaged.
    """
    read_here = partial(_read_block, store, run_id)
    blocks = [{i: expected[i] for i in ids} for ids in split_into_blocks(len(expected), BOOTSTRAP_BLOCKS)]
    summary = ShardSummary()

    def each() -> Iterator[Block]:
        results: Iterable[MergedPartials | None] = map(read_here, blocks)
        if apply and shared and len(expected) > MERGED_HERE:
            results = apply(partial(_read_shared_block, shared, run_id), blocks)
        for block, result in zip(blocks, results, strict=True):
            merged = result or read_here(block)
            summary.add(merged.summary)
            yield merged.block

    return combine_blocks(each()), summary


def _read_shared_block(shared: SharedWarehouse, run_id: str, expected: Expected) -> MergedPartials | None:
    """Read and merge a block in any process. Returns None if the process does not reach the warehouse."""
    store = shared.store()
    return _read_block(store, run_id, expected) if store else None


def _read_block(store: Store, run_id: str, expected: Expected) -> MergedPartials:
    summary = ShardSummary()

    def each() -> Iterator[ShardResult]:
        shards = store.each_shard(run_id, expected)
        for shard_id in expected:
            shard = next(shards, None)
            if shard is None or shard.shard_id != shard_id:
                raise RunFailed(
                    f"The partial of shard {shard_id} is damaged or missing.",
                    "Run the same command again: it measures that shard again, and keeps the others.",
                )
            summary.add(shard)
            yield shard

    return MergedPartials(merge_block(each(), range(min(expected), max(expected) + 1)), summary)
