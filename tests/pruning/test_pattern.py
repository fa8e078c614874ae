"""Sets of layers after which rules that go by place read the rest as it is."""

from __future__ import annotations

from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from avss_dist.plans.pattern import Pattern


def period(number: int) -> list[bool]:
    """Every third layer is special."""
    return [place % 3 == 2 for place in range(number)]


def from_the_end(number: int) -> list[bool]:
    """The last layer and every second one before it are special."""
    return [(number - place) % 2 == 1 for place in range(number)]


def fitting(pattern: Pattern, number: int, candidates: range) -> list[tuple[int, ...]]:
    """All sets of layers to drop after which the rest fits, by trying every one."""
    layers = range(len(pattern.kinds))
    sets = []
    for dropped in combinations(candidates, number):
        if pattern.fits([layer for layer in layers if layer not in dropped]):
            sets.append(dropped)
    return sets


PATTERNS = {"period": Pattern(period(9), period), "end": Pattern(from_the_end(8), from_the_end)}
CANDIDATES = range(1, 8)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_set_is_that_of_all_sets(name: str, seed: int) -> None:
    pattern = PATTERNS[name]
    costs = np.random.default_rng(seed).normal(size=len(pattern.kinds)).tolist()
    for number in range(1, 7):
        sets = fitting(pattern, number, CANDIDATES)
        expected = min(sets, key=lambda dropped: sum(costs[layer] for layer in dropped), default=None)
        assert pattern.cheapest(costs, number, CANDIDATES) == expected


@pytest.mark.parametrize("name", PATTERNS)
def test_sizes_have_gaps(name: str) -> None:
    pattern = PATTERNS[name]
    expected = [number for number in range(1, 8) if fitting(pattern, number, CANDIDATES)]
    assert pattern.sizes(CANDIDATES) == expected


def test_a_draw_is_uniform_over_the_sets_that_fit() -> None:
    pattern = PATTERNS["period"]
    sets = fitting(pattern, 3, CANDIDATES)
    assert len(sets) > 3
    draws = Counter(pattern.draw(3, CANDIDATES, seed) for seed in range(200 * len(sets)))
    assert set(draws) == set(sets)
    assert min(draws.values()) > 150
    assert max(draws.values()) < 250


def test_no_set_fits() -> None:
    pattern = Pattern([True, False, True], lambda number: [False] * number)
    assert pattern.cheapest([0.0] * 3, 1, range(3)) is None
    assert pattern.draw(1, range(3), 0) is None


def test_dropped_layers_can_be_completed() -> None:
    pattern = PATTERNS["period"]
    sets = fitting(pattern, 3, CANDIDATES)
    for first in combinations(CANDIDATES, 2):
        can_complete = any(set(first) <= set(dropped) for dropped in sets)
        assert pattern.can_complete(first, 3, CANDIDATES) == can_complete


def test_equal_costs_drop_earlier_layers() -> None:
    pattern = Pattern(["same"] * 4, lambda number: ["same"] * number)
    assert pattern.cheapest([1.0] * 4, 2, range(4)) == (0, 1)


def test_large_models_are_counted_exactly() -> None:
    """The number of sets of 60 of 120 layers has 117 bits."""
    pattern = Pattern(["same"] * 120, lambda number: ["same"] * number)
    dropped = pattern.draw(60, range(120), 0)
    assert dropped is not None
    assert len(set(dropped)) == 60
