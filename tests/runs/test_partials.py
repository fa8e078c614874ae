"""Partials read back: merged here or elsewhere they are the same, and one that is damaged is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.warehouses import SCALES, activations, stats_of

from avss_dist.core.errors import RunFailed
from avss_dist.runs import run as partials
from avss_dist.runs.run import ShardSummary, merge_partials
from avss_dist.stats.layer_stats import ShardResult
from avss_dist.stats.merging import Merged, merge_blocks
from avss_dist.warehouse.schema import RunIdentity
from avss_dist.warehouse.store import Store, shared

RUN = RunIdentity(run_id="r", model="m", revision="main", family="llama")
NUMBER = 5
HASHES = {i: f"hash{i}" for i in range(NUMBER)}


def layer_names(i: int) -> tuple[str, ...]:
    return tuple(f"layers.{layer} of {i}" for layer in range(len(SCALES)))


def shard(i: int) -> ShardResult:
    model = {"family": "llama", "notes": [f"note {i // 2}"], "last": i}
    return ShardResult(
        shard_id=i,
        content_hash=HASHES[i],
        layers=layer_names(i),
        stats=stats_of(activations(i, shards=1))[0],
        seconds=1.5,
        device=f"device {i}",
        model=model,
        peak_memory_bytes=[10, 50, 20, 40, 30][i],
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Five partials, in blocks of two."""
    monkeypatch.setattr(partials, "BOOTSTRAP_BLOCKS", 3)
    found = Store(tmp_path / "w")
    for i in range(NUMBER):
        found.write_shard(RUN, shard(i))
    return found


def assert_whole(merged: Merged, summary: ShardSummary) -> None:
    expected = merge_blocks([shard(i) for i in range(NUMBER)], 3)
    assert merged.stats.keys() == expected.stats.keys() and len(merged.blocks) == len(expected.blocks) == 3
    assert all(merged.stats[key].equals(stats) for key, stats in expected.stats.items())
    for block, wanted in zip(merged.blocks, expected.blocks, strict=True):
        assert block.keys() == wanted.keys() and all(block[key].equals(wanted[key]) for key in wanted)
    assert summary == ShardSummary(
        layers=layer_names(4),
        model={"family": "llama", "notes": ["note 0", "note 1", "note 2"], "last": 4},
        device="device 4",
        peak_memory_bytes=50,
        seconds=7.5,
    )


class Elsewhere:
    """Applies pickled functions to pickled items, as workers do; those that do not see the warehouse return None."""

    def __init__(self, blind: Sequence[int] = ()) -> None:
        self.blind, self.items, self.merged = blind, 0, 0

    def __call__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterable[Any]:
        for i, item in enumerate(items):
            self.items += 1
            sent, place = pickle.loads(pickle.dumps((function, item)))
            result = None if i in self.blind else sent(place)
            self.merged += result is not None
            yield pickle.loads(pickle.dumps(result))


def test_partials_are_merged_in_blocks(store: Store) -> None:
    assert_whole(*merge_partials(store, None, "r", HASHES, None))
    first = ShardSummary()
    first.add(shard(1))
    assert (first.seconds, first.peak_memory_bytes) == (1.5, 50)


@pytest.mark.parametrize("blind", [(), (1,), (0, 2)])
def test_who_merges_changes_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, blind: Sequence[int]) -> None:
    """Where a worker does not find the warehouse, its block is merged here."""
    monkeypatch.setattr(partials, "MERGED_HERE", NUMBER - 1)
    apply = Elsewhere(blind)
    with shared(store) as warehouse:
        assert_whole(*merge_partials(store, warehouse, "r", HASHES, apply))
    assert apply.items == 3 and apply.merged == 3 - len(blind)


def test_workers_that_see_no_warehouse_merge_nothing(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partials, "MERGED_HERE", 0)
    with shared(store) as warehouse:
        assert warehouse is not None
        other = replace(warehouse, mark="another")
    apply = Elsewhere()
    assert_whole(*merge_partials(store, other, "r", HASHES, apply))
    assert apply.items == 3 and apply.merged == 0


def test_few_shards_and_warehouses_that_cannot_be_shared_are_merged_here(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    apply = Elsewhere()
    monkeypatch.setattr(partials, "MERGED_HERE", NUMBER)
    with shared(store) as warehouse:
        assert_whole(*merge_partials(store, warehouse, "r", HASHES, apply))
    monkeypatch.setattr(partials, "MERGED_HERE", 0)
    assert_whole(*merge_partials(store, None, "r", HASHES, apply))
    with shared(store) as warehouse:
        assert_whole(*merge_partials(store, warehouse, "r", HASHES, None))
    assert apply.items == 0


@pytest.mark.parametrize("gone", range(NUMBER))
def test_a_partial_that_is_gone_or_of_other_text_is_named(store: Store, tmp_path: Path, gone: int) -> None:
    message = f"The partial of shard {gone} is damaged or missing"
    with pytest.raises(RunFailed, match=message):
        merge_partials(store, None, "r", {**HASHES, gone: "of other text"}, None)
    (file,) = (tmp_path / "w").rglob(f"shard-0000{gone}.parquet")
    file.unlink()
    with pytest.raises(RunFailed, match=message):
        merge_partials(store, None, "r", HASHES, None)
