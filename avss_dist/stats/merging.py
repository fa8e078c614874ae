"""The statistics of many shards as one: blocks of consecutive shards first, wherever that is done, then the blocks.

The result depends on the number of shards alone, and not on who merged which block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from avss_dist.stats.histogram import Values, merge_values
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult, without_values


@dataclass(frozen=True)
class Block:
    """Merged statistics of consecutive shards, and apart from them the counts by value, which only the run keeps."""

    stats: Mapping[LayerKey, LayerStats]
    values: Mapping[LayerKey, Values]


def merge_stats(parts: Iterable[Mapping[LayerKey, LayerStats]]) -> dict[LayerKey, LayerStats]:
    """Merge statistics by key, in the order given; a key may be missing from some parts."""
    merged: dict[LayerKey, LayerStats] = {}
    for part in parts:
        for key, stats in part.items():
            merged[key] = merged[key].merge(stats) if key in merged else stats
    return {key: merged[key] for key in sorted(merged)}


def split_into_blocks(num_shards: int, most: int) -> list[range]:
    """The ids of the shards of each block, at most ``most``.

    The number of blocks bounds memory, whatever the size of the corpus.
    """
    size = -(-num_shards // most)
    return [range(start, min(start + size, num_shards)) for start in range(0, num_shards, size or 1)]


def merge_block(shards: Iterable[ShardResult], ids: range) -> Block:
    """Merge the shards of a block, given in the order of their ids.

    Raises:
        ValueError: they are not exactly those.
    """
    stats: dict[LayerKey, LayerStats] = {}
    values: dict[LayerKey, Values] = {}
    seen = ids.start
    for shard in shards:
        if shard.shard_id != seen:
            raise ValueError(f"shard {shard.shard_id} where shard {seen} belongs")
        seen += 1
        for key, one in shard.stats.items():
            values[key] = merge_values(values[key], one.values) if key in values else one.values
        stats = merge_stats((stats, {key: without_values(one) for key, one in shard.stats.items()}))
    if seen != ids.stop:
        raise ValueError(f"{seen - ids.start} shards where {len(ids)} belong")
    return Block(stats, values)


def combine_blocks(blocks: Iterable[Block]) -> tuple[dict[LayerKey, LayerStats], list[Mapping[LayerKey, LayerStats]]]:
    """Merge blocks, in their order: the run, and each block without counts by value."""
    kept: list[Mapping[LayerKey, LayerStats]] = []
    values: dict[LayerKey, Values] = {}
    for block in blocks:
        kept.append(block.stats)
        for key, some in block.values.items():
            values[key] = merge_values(values[key], some) if key in values else some
    merged = merge_stats(kept)
    for key, (abs_value, abs_value_count) in values.items():
        merged[key] = replace(merged[key], abs_value=abs_value, abs_value_count=abs_value_count)
    return merged, kept


def merge_blocks(
    shards: Sequence[ShardResult], most: int
) -> tuple[dict[LayerKey, LayerStats], list[Mapping[LayerKey, LayerStats]]]:
    """Merge shards, given in the order of their ids: the run, and its blocks.

    Raises:
        ValueError: the ids are not exactly 0, 1, ...
    """
    ids = split_into_blocks(len(shards), most)
    return combine_blocks(merge_block(shards[some.start : some.stop], some) for some in ids)
