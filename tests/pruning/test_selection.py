"""Selection: what a choice may combine, the scores that it reads, and the layers that it drops at every bound."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest

from avss_dist.core.errors import ConfigError
from avss_dist.core.names import CONTRAST
from avss_dist.core.registry import BLOCK_DISTANCE, GREEDY
from avss_dist.pruning.selection import LAST, PUBLISHED, RANDOM, Choice, PlanError, count_layers

PLACE = ("site", "recipe", "threshold", "threshold_kind")


def rows_of(reading: tuple[Any, ...], values: list[float | None], **more: Any) -> list[dict[str, Any]]:
    """Rows of `scores`, the last layer first."""
    place = dict(zip(PLACE, reading, strict=True))
    rows = [{"layer": i, "avss_smoothed": v, "rank": 1, **place, **more} for i, v in enumerate(values)]
    return rows[::-1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "avs"}, "Did you mean 'avss'"),
        ({"by": "avss", "share": 1.0}, "`share` must be less than 1"),
        ({"by": "avss", "share": 0.5, "count": 2}, "`share` and `count` are mutually exclusive"),
        ({"by": "avss", "count": 0}, "`count` must be at least 1"),
        ({"by": "avss", "first": -1}, "`first` must be at least 0"),
        ({"by": "avss", "seed": -1, "count": 0}, "2 problems"),
        *(({"by": by, "highest": True}, "chooses among sets") for by in (BLOCK_DISTANCE, GREEDY)),
    ],
)  # fmt: skip
def test_combinations_that_say_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Choice(**options)


def test_scores_are_those_of_one_reading_in_the_order_of_layers() -> None:
    other = ("mlp", *PUBLISHED[1:])
    rows = [*rows_of(PUBLISHED, [3.0, None, 1.0, 2.0]), *rows_of(other, [7.0, 8.0, 9.0, 6.0])]
    np.testing.assert_array_equal(Choice(by="avss").scores(rows, {}), [3, np.nan, 1, 2])
    np.testing.assert_array_equal(Choice(by="avss", reading=other).scores(rows, {}), [7, 8, 9, 6])
    np.testing.assert_array_equal(Choice(by="avss").scores(rows[4:], {}), [7, 8, 9, 6])
    np.testing.assert_array_equal(Choice(by="avss").scores([rows[0], *rows[4:], *rows[1:4]], {}), [3, np.nan, 1, 2])


def test_a_layer_without_a_rank_has_no_avss_and_its_other_scores() -> None:
    rows = rows_of(PUBLISHED, [3.0, 2.0], block_influence=0.5)
    rows[0]["rank"] = None
    np.testing.assert_array_equal(Choice(by="avss").scores(rows, {}), [3, np.nan])
    np.testing.assert_array_equal(Choice(by="block_influence").scores(rows, {}), [0.5, 0.5])


def test_controls_and_the_truth_need_no_scores() -> None:
    rows, truth = rows_of(PUBLISHED, [0.0] * 5), {"loss": np.arange(5.0), CONTRAST: -np.arange(5.0)}
    assert count_layers(rows) == 5
    random = Choice(by=RANDOM, seed=4).scores(rows, truth)
    assert random.tolist() == np.random.default_rng(4).permutation(5).tolist()
    assert Choice(by=LAST).scores(rows, truth).tolist() == [5, 4, 3, 2, 6]
    assert Choice(by=LAST, count=2).drop(Choice(by=LAST).scores(rows, truth)) == (2, 3)
    for by in ("loss", CONTRAST):
        assert Choice(by=by).scores(rows, truth) is truth[by]


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({"count": 2}, (3, 4)),
        ({"count": 2, "first": 4}, (4, 5)),
        ({"count": 2, "last": 3}, (1, 2)),
        ({"count": 2, "first": 1, "last": 3}, (1, 2)),
        ({"count": 1}, (5,)),
        ({"share": 0.5}, (3, 4, 5)),
    ],
)
def test_the_block_with_the_least_distance(options: dict[str, Any], dropped: tuple[int, ...]) -> None:
    """Ties go to the earlier block."""
    costs = np.array([9.0, 3.0, 3.0, 2.0, 1.0, 0.5])
    distances = {
        tuple(range(a, b)): float(costs[a:b].sum()) + 3 * (b == 6 and b - a == 2) for a, b in combinations(range(7), 2)
    }
    choice = Choice(by=BLOCK_DISTANCE, **options)
    assert choice.drop_block(distances, 6) == dropped
    flat = dict.fromkeys(distances, 1.0)
    assert choice.drop_block(flat, 6)[0] == choice.first


@pytest.mark.parametrize("gap", [{}, {(3, 4): np.nan}, {(3, 4): np.inf}])
def test_a_block_without_a_distance_is_named(gap: dict[tuple[int, ...], float]) -> None:
    distances = {(i, i + 1): 1.0 for i in (0, 1, 2, 4)} | gap
    with pytest.raises(PlanError, match=f"Layers 3 to 4 have no measurement '{BLOCK_DISTANCE}'"):
        Choice(by=BLOCK_DISTANCE, count=2).drop_block(distances, 6)
    assert Choice(by=BLOCK_DISTANCE, count=2, last=2).drop_block(distances, 6) == (0, 1)


def test_how_many_are_dropped() -> None:
    assert [Choice(by="avss").number(n) for n in (4, 6, 30)] == [1, 2, 8]
    assert Choice(by="avss", share=0.9).number(10) == 9 and Choice(by="avss", count=2, first=1, last=1).number(4) == 2
    with pytest.raises(PlanError, match="3 layers would be dropped, but only 2 of 4"):
        Choice(by="avss", count=3, first=1, last=1).number(4)
    with pytest.raises(PlanError, match="only 0 of 8 are not protected"):
        Choice(by="avss", first=10**20).number(8)
    assert Choice(by="avss", first=1, last=2).unprotected(6) == range(1, 4)
    assert len(Choice(by="avss", first=3, last=2).unprotected(4)) == 0
