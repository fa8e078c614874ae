"""Sets of layers after which rules that go by place read the rest as it is."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from avss_dist.planning.search import greedy_search
from avss_dist.plans.choice import Choice, PlanError
from avss_dist.plans.criteria import BlockValues, LayerValues
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


# Choices that keep a pattern

THIRDS = Pattern(period(9), period)


def values(*scores: float) -> LayerValues:
    return LayerValues(values=dict(enumerate(scores)))


def test_a_choice_that_keeps_the_pattern_anyway_stays() -> None:
    scores = values(9, 9, 9, 9, 9, 9, 1, 2, 3)
    choice = Choice(by="loss", count=3)
    assert replace(choice, keep_pattern=True).choose(scores, 9, THIRDS) == choice.choose(scores, 9) == (6, 7, 8)


def test_a_choice_goes_to_the_cheapest_set_that_keeps_the_pattern() -> None:
    scores = values(1, 9, 9, 1.5, 9, 9, 2, 9, 9)
    assert Choice(by="loss", count=3).choose(scores, 9) == (0, 3, 6)
    assert Choice(by="loss", count=3, keep_pattern=True).choose(scores, 9, THIRDS) == (0, 2, 3)


def test_scores_that_do_not_add_up_are_ranked() -> None:
    """Ranks 1 and 9 for layers 0 and 1 in place of their AVSS, which would decide alone."""
    pattern = Pattern("abcd", lambda number: "abcd"[-number:] if number == 3 else "cd")
    scores = values(0.0, 1000.0, 0.1, 0.2)
    assert Choice(by="avss", count=2, keep_pattern=True).choose(scores, 4, pattern) == (0, 1)


def test_random_choices_keep_the_pattern() -> None:
    choices = [Choice(by="random", count=3, seed=seed, keep_pattern=True) for seed in range(20)]
    drawn = [choice.choose(values(*range(9)), 9, THIRDS) for choice in choices]
    for dropped in drawn:
        assert THIRDS.fits_without(dropped)
    assert len(set(drawn)) > 3


def test_a_block_keeps_the_pattern() -> None:
    blocks = BlockValues(values={(start, start + 1, start + 2): 7.0 - start for start in range(7)})
    pattern = Pattern(period(9), lambda number: [place % 3 == 2 for place in range(number)])
    assert Choice(by="block_distance", count=3).choose(blocks, 9) == (6, 7, 8)
    assert Choice(by="block_distance", count=3, last=1, keep_pattern=True).choose(blocks, 9, pattern) == (5, 6, 7)


def test_an_error_names_the_nearest_numbers_of_layers() -> None:
    pattern = Pattern("aab", lambda number: "ba" if number == 2 else "b")
    with pytest.raises(PlanError, match="Without 1 of 3 layers") as caught:
        Choice(by="loss", count=1, keep_pattern=True).choose(values(1, 2, 3), 3, pattern)
    assert "Drop 2 " in str(caught.value.hint)


def test_protected_layers_stay() -> None:
    choice = Choice(by="loss", count=3, first=1, last=1, keep_pattern=True)
    dropped = choice.choose(values(*range(9)), 9, THIRDS)
    assert not {0, 8} & set(dropped)


def test_a_search_goes_only_to_sets_that_can_be_completed() -> None:
    """Each round is offered the layers with which a set of three that fits remains possible."""
    offered: list[tuple[int, ...]] = []

    def losses(base: tuple[int, ...], layers: tuple[int, ...]) -> dict[tuple[int, ...], Any]:
        offered.append(layers)
        return {tuple(sorted([*base, layer])): SimpleNamespace(value=float(sum(base) + layer)) for layer in layers}

    chosen, _ = greedy_search(range(9), 3, losses, pattern=THIRDS)
    assert THIRDS.fits_without(chosen)
    for base_size, layers in enumerate(offered):
        assert layers
        assert base_size < 3
