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
    return [dropped for dropped in combinations(candidates, number) if pattern.fits_without(dropped)]


PATTERNS = {"period": Pattern(period(9), period), "end": Pattern(from_the_end(8), from_the_end)}
CANDIDATES = range(1, 8)


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("seed", range(5))
def test_the_cheapest_set_is_that_of_all_sets(name: str, seed: int) -> None:
    pattern = PATTERNS[name]
    rng = np.random.default_rng(seed)
    costs = rng.normal(size=len(pattern.kinds)).tolist()

    def cost(dropped: tuple[int, ...]) -> float:
        return sum(costs[layer] for layer in dropped)

    for number in range(1, 7):
        sets = fitting(pattern, number, CANDIDATES)
        assert pattern.cheapest(costs, number, CANDIDATES) == min(sets, key=cost, default=None)


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


def choices(by: str, count: int) -> tuple[Choice, Choice]:
    """A choice that goes by its values alone, and the same with the pattern kept."""
    return Choice(by=by, count=count), Choice(by=by, count=count, keep_pattern=True)


RISING = values(*range(9))


def test_a_choice_that_keeps_the_pattern_anyway_stays() -> None:
    scores = values(9, 9, 9, 9, 9, 9, 1, 2, 3)
    free, keeping = choices("loss", 3)
    assert free.choose(scores, 9) == (6, 7, 8)
    assert keeping.choose(scores, 9, THIRDS) == (6, 7, 8)


def test_a_choice_goes_to_the_cheapest_set_that_keeps_the_pattern() -> None:
    scores = values(1, 9, 9, 1.5, 9, 9, 2, 9, 9)
    free, keeping = choices("loss", 3)
    assert free.choose(scores, 9) == (0, 3, 6)
    assert keeping.choose(scores, 9, THIRDS) == (0, 2, 3)


def test_scores_that_do_not_add_up_are_ranked() -> None:
    """Ranks 1 and 9 for layers 0 and 1 in place of their AVSS, which would decide alone."""
    pattern = Pattern("abcd", lambda number: "abcd"[-number:] if number == 3 else "cd")
    scores = values(0.0, 1000.0, 0.1, 0.2)
    _, keeping = choices("avss", 2)
    assert keeping.choose(scores, 4, pattern) == (0, 1)


def test_random_choices_keep_the_pattern() -> None:
    drawn = set()
    for seed in range(20):
        choice = Choice(by="random", count=3, seed=seed, keep_pattern=True)
        dropped = choice.choose(RISING, 9, THIRDS)
        assert THIRDS.fits_without(dropped)
        drawn.add(dropped)
    assert len(drawn) > 3


def test_a_block_keeps_the_pattern() -> None:
    distances = {(start, start + 1, start + 2): 7.0 - start for start in range(7)}
    blocks = BlockValues(values=distances)
    free, keeping = choices("block_distance", 3)
    assert free.choose(blocks, 9) == (6, 7, 8)
    assert replace(keeping, last=1).choose(blocks, 9, THIRDS) == (5, 6, 7)


def test_an_error_names_the_nearest_numbers_of_layers() -> None:
    pattern = Pattern("aab", lambda number: "ba" if number == 2 else "b")
    _, keeping = choices("loss", 1)
    with pytest.raises(PlanError, match="Without 1 of 3 layers") as caught:
        keeping.choose(values(1, 2, 3), 3, pattern)
    assert "Drop 2 " in str(caught.value.hint)


def test_protected_layers_stay() -> None:
    choice = Choice(by="loss", count=3, first=1, last=1, keep_pattern=True)
    dropped = choice.choose(RISING, 9, THIRDS)
    assert 0 not in dropped
    assert 8 not in dropped


def test_a_search_goes_only_to_sets_that_can_be_completed() -> None:
    """Each round is offered the layers with which a set of three that fits remains possible."""
    offered: list[tuple[int, ...]] = []

    def losses(base: tuple[int, ...], layers: tuple[int, ...]) -> dict[tuple[int, ...], Any]:
        offered.append(layers)
        results = {}
        for layer in layers:
            loss = float(sum(base) + layer)
            dropped = tuple(sorted([*base, layer]))
            results[dropped] = SimpleNamespace(value=loss)
        return results

    chosen, _ = greedy_search(range(9), 3, losses, pattern=THIRDS)
    assert THIRDS.fits_without(chosen)
    for base_size, layers in enumerate(offered):
        assert layers
        assert base_size < 3
