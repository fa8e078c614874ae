"""Statistics beyond what memory has room for: the same, mapped from a file, or in memory where none can be written."""

from __future__ import annotations

import tempfile
from typing import Any, NoReturn

import numpy as np
import pytest
from support.oracle import oracle_stats

from avss_dist.core.settings import THRESHOLDS
from avss_dist.stats import spill
from avss_dist.stats.layer_stats import LayerKey, LayerStats, without_values


def block(seed: int) -> dict[LayerKey, LayerStats]:
    x = np.random.default_rng(seed).normal(size=(2, 2, 3, 5))
    one = [oracle_stats(v, np.ones((2, 3), bool), np.array(THRESHOLDS), units=True) for v in x]
    return {(layer, "block"): without_values(stats) for layer, stats in enumerate(one)}


def in_memory(stats: Any) -> bool:
    return all(one.unit_sum.flags.writeable and one.histogram.flags.writeable for one in stats.values())


BYTES = 2 * (2048 + 5 + 5) * 8  # of a block: two layers of a histogram and two sums by unit


@pytest.mark.parametrize(("room", "fit"), [(0, 0), (BYTES - 1, 0), (BYTES, 1), (2 * BYTES - 1, 1), (3 * BYTES, 3)])
def test_so_many_blocks_stay_in_memory_and_all_are_the_same(
    monkeypatch: pytest.MonkeyPatch, room: int, fit: int
) -> None:
    monkeypatch.setattr(spill, "KEPT_BYTES", room)
    keeper = spill.Spill()
    kept = [keeper.keep(block(seed)) for seed in range(4)]
    assert [in_memory(stats) for stats in kept] == [i < fit for i in range(4)]
    for seed, stats in enumerate(kept):
        assert stats.keys() == block(seed).keys()
        assert all(stats[key].equals(one) for key, one in block(seed).items())
    nothing: dict[LayerKey, LayerStats] = {}
    assert keeper.keep(nothing) is nothing


def test_memory_is_taken_where_no_file_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> NoReturn:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(spill, "KEPT_BYTES", 0)
    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    stats = block(0)
    assert spill.Spill().keep(stats) is stats
