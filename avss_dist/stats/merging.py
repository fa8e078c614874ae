"""Merging of the statistics of many shards: first into blocks of consecutive shards, then across blocks.

The result depends only on the number of shards. It is the same whichever process merged which block.
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
    """Merged statistics of consecutive shards. Counts by value are kept separately, since only the run stores them.

    For paired text, only the statistics by stratum are filled in. `merge_strata` computes the others.

    Attributes:
        stats: statistics without counts by value.
        values: counts by value.
        strata: statistics by stratum without counts by value.
        stratum_values: counts by value and stratum.
    """

    stats: Mapping[LayerKey, LayerStats]
    values: Mapping[LayerKey, Values]
    strata: Mapping[StratumKey, LayerStats]
    stratum_values: Mapping[StratumKey, Values]


@dataclass(frozen=True)
class Merged:
    """Merged statistics of a run.

    Attributes:
        stats: statistics of the run, with counts by value.
        blocks: statistics of each block, without counts by value.
        strata: statistics of the run by stratum for paired text, else empty.
    """

    stats: dict[LayerKey, LayerStats]
    blocks: list[Mapping[LayerKey, LayerStats]]
    strata: dict[StratumKey, LayerStats]


def merge_stats(parts: Iterable[Mapping[Key, LayerStats]]) -> dict[Key, LayerStats]:
    """Merge statistics by key, in the order of the parts. A key may be missing from some parts."""
    merged: dict[Key, LayerStats] = {}
    for part in parts:
        for key, stats in part.items():
            merged[key] = merged[key].merge(stats) if key in merged else stats
    return {key: merged[key] for key in sorted(merged)}


def split_into_blocks(num_shards: int, maximum: int) -> list[range]:
    """Return the shard ids of each block, for at most ``maximum`` blocks.

    The limit bounds memory, whatever the size of the corpus.
    """
    size = -(-num_shards // maximum)
    return [range(start, min(start + size, num_shards)) for start in range(0, num_shards, size or 1)]


def merge_block(shards: Iterable[ShardResult], ids: range) -> Block:
    """Merge the shards of a block, given in the order of their ids.

    Raises:
        ValueError: if the ids of the shards are not exactly ``ids``.
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
    """Return the statistics merged with those of a shard. Add the shard's counts by value to ``values``."""
    _add_values(values, {key: one.values for key, one in shard.items()})
    return merge_stats((merged, {key: without_values(one) for key, one in shard.items()}))


def _add_values(values: dict[Key, Values], added: Mapping[Key, Values]) -> None:
    for key, counts in added.items():
        values[key] = merge_values(values[key], counts) if key in values else counts


def combine_blocks(blocks: Iterable[Block]) -> Merged:
    """Merge blocks, in the order given."""
    block_stats: list[Mapping[LayerKey, LayerStats]] = []
    stats: dict[LayerKey, LayerStats] = {}
    strata: dict[StratumKey, LayerStats] = {}
    spill = Spill()
    values: dict[LayerKey, Values] = {}
    stratum_values: dict[StratumKey, Values] = {}
    for block in blocks:
        block_stats.append(spill.keep(merge_strata(block.strata) if block.strata else block.stats))
        stats, strata = merge_stats((stats, block.stats)), merge_stats((strata, block.strata))
        _add_values(values, block.values)
        _add_values(stratum_values, block.stratum_values)
    strata = _with_values(strata, stratum_values)
    stats = merge_strata(strata) if strata else _with_values(stats, values)
    return Merged(stats, block_stats, strata)


def _with_values(merged: dict[Key, LayerStats], values: Mapping[Key, Values]) -> dict[Key, LayerStats]:
    for key, (abs_value, abs_value_count) in values.items():
        merged[key] = replace(merged[key], abs_value=abs_value, abs_value_count=abs_value_count)
    return merged


def merge_strata(strata: Mapping[StratumKey, LayerStats]) -> dict[LayerKey, LayerStats]:
    """Merge the strata of all labels into statistics by (layer, site). Answers after another prompt are left out."""
    labels = dict.fromkeys(label for _, _, label in sorted(strata) if not label.endswith(AFTER_ANOTHER))
    return merge_stats(
        {(layer, site): one for (layer, site, of), one in strata.items() if of == label} for label in labels
    )


def merge_blocks(shards: Sequence[ShardResult], maximum: int) -> Merged:
    """Merge shards in at most ``maximum`` blocks, given in the order of their ids.

    Raises:
        ValueError: if the ids are not exactly 0, 1, ...
    """
    ids = split_into_blocks(len(shards), maximum)
    return combine_blocks(merge_block(shards[block_ids.start : block_ids.stop], block_ids) for block_ids in ids)
