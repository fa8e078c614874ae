"""Change points: planted ones are found, noise and short sequences have none, and splits are the best there are."""

from __future__ import annotations

import numpy as np
import pytest

from avss_dist.stats.change_points import MIN_SEGMENT, change_points

pytestmark = pytest.mark.nightly


def steps(*segments: tuple[int, float], noise: float, seed: int = 0, width: int = 6) -> np.ndarray:
    """Return a sequence whose mean is that of a random direction times the level of each segment."""
    random = np.random.default_rng(seed)
    direction = random.normal(size=width)
    levels = np.concatenate([np.full(length, level) for length, level in segments])
    return levels[:, None] * direction + noise * random.normal(size=(len(levels), width))


@pytest.mark.parametrize("seed", range(5))
def test_planted_changes_are_found_where_they_are(seed: int) -> None:
    assert change_points(steps((7, 0.0), (9, 5.0), (6, -5.0), noise=0.3, seed=seed)) == [7, 16]


def test_noise_has_as_many_as_the_level_allows() -> None:
    found = [change_points(np.random.default_rng(seed).normal(size=(12, 5)), permutations=199) for seed in range(100)]
    assert sum(map(bool, found)) <= 12, "5% are expected; more than 12 of 100 have a probability of 0.2%"


def test_a_split_is_the_one_with_the_lowest_sum_of_squares() -> None:
    sequence = steps((5, 0.0), (8, 1.0), noise=0.4, seed=3)

    def squares(part: np.ndarray) -> float:
        return float(((part - part.mean(axis=0)) ** 2).sum())

    splits = range(MIN_SEGMENT, len(sequence) - MIN_SEGMENT + 1)
    best = min(splits, key=lambda split: squares(sequence[:split]) + squares(sequence[split:]))
    assert best in change_points(sequence, level=1.0)


@pytest.mark.parametrize("length", [0, 1, 3, 4, 6])
def test_few_points_have_no_change(length: int) -> None:
    assert change_points(steps((length // 2, 0.0), (length - length // 2, 9.0), noise=0.01)) == []


def test_a_constant_sequence_has_no_change() -> None:
    assert change_points(np.ones((20, 3))) == []
