"""Merging of the statistics of many shards: first into blocks of consecutive shards, then across blocks.

The result depends only on the number of shards. It is the same whichever process merged which block.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from avss_dist.core.names import AFTER_ANOTHER
from avss_dist.stats.histogram import Values, merge_values
from avss_dist.stats.layer_stats import ExpertStats, LayerKey, LayerStats, ShardResult, StratumKey, without_values

KEPT_BYTES = 128 << 20
_LARGE = ("histogram", "unit_sum", "unit_sum_sq")

Key = TypeVar("Key", LayerKey, StratumKey, int)
Stats = TypeVar("Stats", LayerStats, ExpertStats)


@dataclass(frozen=True)
class Block:
    """Merged statistics of consecutive shards, by stratum. Unpaired text has one stratum with an empty name.

    Attributes:
        strata: statistics without counts by value.
        values: counts by value, which are kept separately, since only the run stores them.
    """

    strata: Mapping[StratumKey, LayerStats]
    values: Mapping[StratumKey, Values]


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


def merge_stats(parts: Iterable[Mapping[Key, Stats]]) -> dict[Key, Stats]:
    """Merge statistics by key, in the order of the parts. A key may be missing from some parts."""
    merged: dict[Key, Stats] = {}
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
    strata: dict[StratumKey, LayerStats] = {}
    values: dict[StratumKey, Values] = {}
    expected = ids.start
    for shard in shards:
        if shard.shard_id != expected:
            raise ValueError(f"shard {shard.shard_id} where shard {expected} belongs")
        expected += 1
        added = shard.strata or {(*key, ""): stats for key, stats in shard.stats.items()}
        _add_values(values, {key: stats.values for key, stats in added.items()})
        strata = merge_stats((strata, {key: without_values(stats) for key, stats in added.items()}))
    if expected != ids.stop:
        raise ValueError(f"{expected - ids.start} shards where {len(ids)} belong")
    return Block(strata, values)


def _add_values(values: dict[StratumKey, Values], added: Mapping[StratumKey, Values]) -> None:
    for key, counts in added.items():
        values[key] = merge_values(values[key], counts) if key in values else counts


def combine_blocks(blocks: Iterable[Block]) -> Merged:
    """Merge blocks, in the order given.

    At most `KEPT_BYTES` of the large arrays of blocks stay in memory. Further ones are mapped from temporary files.
    """
    block_stats: list[Mapping[LayerKey, LayerStats]] = []
    strata: dict[StratumKey, LayerStats] = {}
    values: dict[StratumKey, Values] = {}
    room = KEPT_BYTES
    for block in blocks:
        stats = merge_strata(block.strata)
        room -= sum(getattr(layer_stats, name).nbytes for layer_stats in stats.values() for name in _LARGE)
        block_stats.append(stats if room >= 0 else _mapped(stats))
        strata = merge_stats((strata, block.strata))
        _add_values(values, block.values)
    for key, (abs_value, abs_value_count) in values.items():
        strata[key] = replace(strata[key], abs_value=abs_value, abs_value_count=abs_value_count)
    return Merged(merge_strata(strata), block_stats, strata if any(label for *_, label in strata) else {})


def _mapped(stats: Mapping[LayerKey, LayerStats]) -> Mapping[LayerKey, LayerStats]:
    """Return the same statistics with their large fields in one memory-mapped file, which has no name.

    If the file cannot be written, they stay in memory.
    """
    try:
        with tempfile.TemporaryFile() as file:
            for layer_stats in stats.values():
                for name in _LARGE:
                    file.write(getattr(layer_stats, name).tobytes())
            file.flush()
            whole = np.asarray(np.memmap(file, np.uint8, "r"))
    except (OSError, ValueError):  # numpy raises ValueError for an empty file
        return stats
    mapped, at = {}, 0
    for key, layer_stats in stats.items():
        fields = {}
        for name in _LARGE:
            field = getattr(layer_stats, name)
            fields[name] = whole[at : at + field.nbytes].view(field.dtype)
            at += field.nbytes
        mapped[key] = replace(layer_stats, **fields)
    return mapped


def merge_strata(strata: Mapping[StratumKey, LayerStats]) -> dict[LayerKey, LayerStats]:
    """Merge the strata of all labels into statistics by (layer, site). Answers after another prompt are left out."""
    labels = dict.fromkeys(label for _, _, label in sorted(strata) if not label.endswith(AFTER_ANOTHER))
    return merge_stats(
        {(layer, site): stats for (layer, site, stratum), stats in strata.items() if stratum == label}
        for label in labels
    )


def merge_blocks(shards: Sequence[ShardResult], maximum: int) -> Merged:
    """Merge shards in at most ``maximum`` blocks, given in the order of their ids.

    Raises:
        ValueError: if the ids are not exactly 0, 1, ...
    """
    ids = split_into_blocks(len(shards), maximum)
    return combine_blocks(merge_block(shards[block_ids.start : block_ids.stop], block_ids) for block_ids in ids)
