"""The partials of a run, read back and merged: block by block, here or by workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from avss_dist.errors import RunFailed
from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.stats.merging import Block, Merged, combine_blocks, merge_block, split_into_blocks
from avss_dist.warehouse.sharing import SharedWarehouse
from avss_dist.warehouse.store import Store

MERGED_HERE = 400  # shards: more are worth the start of tasks

Expected = Mapping[int, str]
"""The content hash of shards, by their ids, in order."""
Apply = Callable[[Callable[[Expected], Any], Sequence[Expected]], Iterable[Any]]
"""The function of every item, in their order; see `executors.base.Executor.apply`."""


@dataclass
class Circumstances:
    """What the row of a run says of its shards.

    Attributes:
        layers, model, device: of the last of them; the notes of all.
        peak_memory_bytes, seconds: the highest, and of all together.
    """

    layers: tuple[str, ...] = ()
    model: dict[str, Any] = field(default_factory=dict)
    device: str = ""
    peak_memory_bytes: int = 0
    seconds: float = 0.0

    def add(self, other: ShardResult | Circumstances) -> None:
        """Take in those of a later shard, or of later ones."""
        notes = list(dict.fromkeys([*self.model.get("notes", ()), *other.model["notes"]]))
        self.layers, self.model, self.device = other.layers, {**other.model, "notes": notes}, other.device
        self.peak_memory_bytes = max(self.peak_memory_bytes, other.peak_memory_bytes)
        self.seconds += other.seconds


@dataclass(frozen=True)
class MergedPartials:
    """The partials of a block as one."""

    block: Block
    circumstances: Circumstances


def merge_partials(
    store: Store, shared: SharedWarehouse | None, run_id: str, expected: Expected, apply: Apply | None
) -> tuple[Merged, Circumstances]:
    """The statistics of a run and of its blocks, and what its row says of its shards.

    Args:
        expected: of every shard, from 0.
        apply: does a part of the work elsewhere; None where it is done here.

    Raises:
        RunFailed: a partial is not there, or damaged.
    """
    here = partial(_read_block, store, run_id)
    blocks = [{i: expected[i] for i in ids} for ids in split_into_blocks(len(expected), BOOTSTRAP_BLOCKS)]
    circumstances = Circumstances()

    def each() -> Iterator[Block]:
        found: Iterable[MergedPartials | None] = map(here, blocks)
        if apply and shared and len(expected) > MERGED_HERE:
            found = apply(partial(_read_shared_block, shared, run_id), blocks)
        for block, merged in zip(blocks, found, strict=True):
            one = merged or here(block)
            circumstances.add(one.circumstances)
            yield one.block

    return combine_blocks(each()), circumstances


def _read_shared_block(shared: SharedWarehouse, run_id: str, expected: Expected) -> MergedPartials | None:
    """As `_read_block`, in any process; None where it does not see the warehouse."""
    store = shared.store()
    return _read_block(store, run_id, expected) if store else None


def _read_block(store: Store, run_id: str, expected: Expected) -> MergedPartials:
    circumstances = Circumstances()

    def each() -> Iterator[ShardResult]:
        found = store.each_shard(run_id, expected)
        for shard_id in expected:
            shard = next(found, None)
            if shard is None or shard.shard_id != shard_id:
                raise RunFailed(
                    f"The partial of shard {shard_id} was written, and is damaged now.",
                    "Run the same command again: it measures that shard again, and keeps the others.",
                )
            circumstances.add(shard)
            yield shard

    return MergedPartials(merge_block(each(), range(min(expected), max(expected) + 1)), circumstances)
