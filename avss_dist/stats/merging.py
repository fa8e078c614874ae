"""The statistics of many shards as one: blocks of consecutive shards first, wherever that is done, then the blocks.

The result depends on the number of shards alone, and not on who merged which block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from avss_dist.core.names import AFTER_ANOTHER
from avss_dist.stats.histogram import Values, merge_values
from avss_dist.stats.layer_stats import LayerKey, LayerStats, ShardResult, StratumKey, without_values
from avss_dist.stats.spill import Spill

Key = TypeVar("Key", LayerKey, StratumKey)


@dataclass(frozen=True)
class Block:
    """Merged statistics of consecutive shards, and apart from them the counts by value, which only the run keeps.

    Of paired text there are those of strata alone: `merge_strata` gives the others.
    """

    stats: Mapping[LayerKey, LayerStats]
    values: Mapping[LayerKey, Values]
    strata: Mapping[StratumKey, LayerStats]
    stratum_values: Mapping[StratumKey, Values]


@dataclass(frozen=True)
class Merged:
    """The statistics of a run, and of its blocks without counts by value; of paired text, those of strata too."""

    stats: dict[LayerKey, LayerStats]
    blocks: list[Mapping[LayerKey, LayerStats]]
    strata: dict[StratumKey, LayerStats]


def merge_stats(parts: Iterable[Mapping[Key, LayerStats]]) -> dict[Key, LayerStats]:
    """Merge statistics by key, in the order given; a key may be missing from some parts."""
    merged: dict[Key, LayerStats] = {}
    for part in parts:
        for key, stats in part.items():
            merged[key] = merged[key].merge(stats) if key in merged else stats
    return {key: merged[key] for key in sorted(merged)}


def split_into_blocks(num_shards: int, most: int) -> list[range]:
    """Return the ids of the shards of each block, at most ``most``.

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
    strata: dict[StratumKey, LayerStats] = {}
    stratum_values: dict[StratumKey, Values] = {}
    seen = ids.start
    for shard in shards:
        if shard.shard_id != seen:
            raise ValueError(f"shard {shard.shard_id} where shard {seen} belongs")
        seen += 1
        if shard.strata:
            strata = _add(strata, stratum_values, shard.strata)
        else:
            stats = _add(stats, values, shard.stats)
    if seen != ids.stop:
        raise ValueError(f"{seen - ids.start} shards where {len(ids)} belong")
    return Block(stats, values, strata, stratum_values)


def _add(
    merged: Mapping[Key, LayerStats], values: dict[Key, Values], shard: Mapping[Key, LayerStats]
) -> dict[Key, LayerStats]:
    """Statistics with those of a shard, whose counts by value go into ``values``."""
    _add_values(values, {key: one.values for key, one in shard.items()})
    return merge_stats((merged, {key: without_values(one) for key, one in shard.items()}))


def _add_values(values: dict[Key, Values], more: Mapping[Key, Values]) -> None:
    for key, some in more.items():
        values[key] = merge_values(values[key], some) if key in values else some


def combine_blocks(blocks: Iterable[Block]) -> Merged:
    """Merge blocks, in their order."""
    kept: list[Mapping[LayerKey, LayerStats]] = []
    stats: dict[LayerKey, LayerStats] = {}
    strata: dict[StratumKey, LayerStats] = {}
    spill = Spill()
    values: dict[LayerKey, Values] = {}
    stratum_values: dict[StratumKey, Values] = {}
    for block in blocks:
        kept.append(spill.keep(merge_strata(block.strata) if block.strata else block.stats))
        stats, strata = merge_stats((stats, block.stats)), merge_stats((strata, block.strata))
        _add_values(values, block.values)
        _add_values(stratum_values, block.stratum_values)
    strata = _with_values(strata, stratum_values)
    stats = merge_strata(strata) if strata else _with_values(stats, values)
    return Merged(stats, kept, strata)


def _with_values(merged: dict[Key, LayerStats], values: Mapping[Key, Values]) -> dict[Key, LayerStats]:
    for key, (abs_value, abs_value_count) in values.items():
        merged[key] = replace(merged[key], abs_value=abs_value, abs_value_count=abs_value_count)
    return merged


def merge_strata(strata: Mapping[StratumKey, LayerStats]) -> dict[LayerKey, LayerStats]:
    """Statistics of paired text as of any other: of all answers after their own prompts, merged by label."""
    labels = dict.fromkeys(label for _, _, label in sorted(strata) if not label.endswith(AFTER_ANOTHER))
    return merge_stats(
        {(layer, site): one for (layer, site, of), one in strata.items() if of == label} for label in labels
    )


def merge_blocks(shards: Sequence[ShardResult], most: int) -> Merged:
    """Merge shards, given in the order of their ids.

    Raises:
        ValueError: the ids are not exactly 0, 1, ...
    """
    ids = split_into_blocks(len(shards), most)
    return combine_blocks(merge_block(shards[some.start : some.stop], some) for some in ids)
