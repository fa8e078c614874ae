"""Merging of paired text: strata first, and from them the statistics of all answers after their own prompts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from unittest.mock import Mock

import numpy as np
import pytest
from support.oracle import assert_close, oracle_stats

from avss_dist.core.names import AFTER_ANOTHER
from avss_dist.core.settings import THRESHOLDS
from avss_dist.stats import merging
from avss_dist.stats.layer_stats import LayerStats, ShardResult, StratumKey, without_values
from avss_dist.stats.merging import (
    combine_blocks,
    merge_block,
    merge_blocks,
    merge_stats,
    merge_strata,
    split_into_blocks,
)

GRID = np.array(THRESHOLDS)
LABELS = ("right", "wrong")


def stratum(seed: int) -> LayerStats:
    x = np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32).astype(np.float64)
    return oracle_stats(x, np.ones((2, 3), bool), GRID, units=True)


def paired_shard(shard_id: int, labels: Sequence[str] = LABELS) -> ShardResult:
    strata: dict[StratumKey, LayerStats] = {}
    for number, label in enumerate([*labels, *(label + AFTER_ANOTHER for label in labels)]):
        strata |= {(layer, "mlp", label): stratum(100 * shard_id + 10 * number + layer) for layer in range(2)}
    return ShardResult(shard_id=shard_id, content_hash="", layers=("a", "b"), stats={}, strata=strata)


def test_paired_text_is_merged_by_stratum_and_its_own_answers_by_layer() -> None:
    shards = [paired_shard(0), paired_shard(1, ["wrong"]), paired_shard(2), paired_shard(3), paired_shard(4)]
    merged = merge_blocks(shards, 3)
    assert list(merged.strata) == sorted(shards[0].strata)
    for key, stats in merged.strata.items():
        expected = merge_stats({key: shard.strata[key]} for shard in shards if key in shard.strata)[key]
        assert_close(stats, expected)
        assert stats.abs_value_count.sum() == stats.count and np.array_equal(stats.abs_value, expected.abs_value)
    assert list(merged.stats) == [(0, "mlp"), (1, "mlp")]
    for (layer, site), stats in merged.stats.items():
        both = [merged.strata[layer, site, label] for label in LABELS]
        assert stats.equals(both[0].merge(both[1]))
    assert len(merged.blocks) == 3
    for block, members in zip(merged.blocks, (shards[:2], shards[2:4], shards[4:]), strict=True):
        assert list(block) == [(0, "mlp"), (1, "mlp")]
        for layer in range(2):
            own = [shard.strata.get((layer, "mlp", label)) for label in LABELS for shard in members]
            expected = merge_stats({layer: without_values(stats)} for stats in own if stats is not None)
            assert_close(block[layer, "mlp"], expected[layer])


def test_a_block_keeps_the_counts_by_value_apart() -> None:
    block = merge_block([paired_shard(3), paired_shard(4)], range(3, 5))
    assert block.strata.keys() == block.values.keys() == paired_shard(3).strata.keys()
    for key, stats in block.strata.items():
        whole = paired_shard(3).strata[key].merge(paired_shard(4).strata[key])
        assert stats.equals(without_values(whole))
        for values, expected in zip(block.values[key], whole.values, strict=True):
            assert np.array_equal(values, expected)


def test_labels_are_merged_in_their_order_and_answers_after_another_prompt_left_out() -> None:
    shard = paired_shard(7)
    disordered = dict(reversed(shard.strata.items()))
    for strata in (shard.strata, disordered):
        merged = merge_strata(strata)
        for layer in range(2):
            right, wrong = (shard.strata[layer, "mlp", label] for label in LABELS)
            assert merged[layer, "mlp"].equals(right.merge(wrong))


@pytest.mark.parametrize(
    ("num_shards", "most", "expected"),
    [
        (0, 4, []),
        (3, 4, [range(1), range(1, 2), range(2, 3)]),
        (8, 4, [range(2), range(2, 4), range(4, 6), range(6, 8)]),
        (9, 4, [range(3), range(3, 6), range(6, 9)]),
        (10, 4, [range(3), range(3, 6), range(6, 9), range(9, 10)]),
    ],
)
def test_blocks_are_as_small_as_their_number_allows(num_shards: int, most: int, expected: list[range]) -> None:
    assert split_into_blocks(num_shards, most) == expected


BYTES = 2 * (2048 + 4 + 4) * 8  # of a block: two layers of a histogram and two sums by unit


@pytest.mark.parametrize(("room", "fit"), [(0, 0), (BYTES - 1, 0), (BYTES, 1), (2 * BYTES - 1, 1), (3 * BYTES, 3)])
def test_blocks_beyond_the_room_in_memory_are_mapped_and_the_same(
    monkeypatch: pytest.MonkeyPatch, room: int, fit: int
) -> None:
    blocks = [merge_block([paired_shard(shard, ["right"])], range(shard, shard + 1)) for shard in range(4)]
    expected = combine_blocks(blocks).blocks
    monkeypatch.setattr(merging, "KEPT_BYTES", room)

    def numbers_in_memory() -> list[bool]:
        stats = combine_blocks(blocks).blocks
        assert [list(block) for block in stats] == [list(block) for block in expected]
        assert all(block[key].equals(other[key]) for block, other in zip(stats, expected, strict=True) for key in block)
        return [all(one.unit_sum.flags.writeable for one in block.values()) for block in stats]

    assert numbers_in_memory() == [i < fit for i in range(4)]
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=OSError(28, "No space left on device")))
    assert all(numbers_in_memory())
