"""The set of least predicted loss: against every set, at the ends, and beyond what can be enumerated."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from avss_dist.pruning import interactions
from avss_dist.pruning.interactions import quadratic
from avss_dist.pruning.selection import PlanError
from avss_dist.stats.layer_stats import Float64


def value(layers: tuple[int, ...], b: Float64, h: Float64) -> float:
    x = np.isin(np.arange(len(b)), layers).astype(np.float64)
    return float(b @ x + x @ h @ x / 2)


def drawn(seed: int, n: int, rank: int, indefinite: bool = False) -> tuple[Float64, Float64]:
    """A first-order vector and a Fisher matrix, as a few samples give it; or any matrix."""
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(rank, n)) * rng.gamma(1.0, size=n)
    h = rng.normal(size=(n, n)) if indefinite else a.T @ a / rank
    return rng.normal(size=n), h


@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 6), st.booleans(), st.booleans(), st.data())
def test_no_set_is_better(seed: int, n: int, rank: int, indefinite: bool, searched: bool, data: st.DataObject) -> None:
    """Of all sets; and where a local search is made, of those that are a swap away."""
    b, h = drawn(seed, n, rank, indefinite)
    first = data.draw(st.integers(0, n - 1))
    last = data.draw(st.integers(0, n - 1 - first))
    count = data.draw(st.integers(1, max(1, n - max(1, first + last))))
    with pytest.MonkeyPatch.context() as patch:
        if searched:
            patch.setattr(interactions, "MAXIMUM_SETS", 0)
        found = quadratic(b, h, count, first, last)
    assert len(found) == count and list(found) == sorted(set(found))
    assert first <= found[0] and found[-1] < n - last
    least = min(
        value(layers, b, h)
        for layers in combinations(range(first, n - last), count)
        if not searched or len({*layers} - {*found}) <= 1
    )
    assert value(found, b, h) == pytest.approx(least, abs=1e-9)


def test_pairs_decide() -> None:
    """Two layers that are cheap alone and dear together."""
    b, h = np.array([0.1, 0.1, 0.5, 0.5]), np.zeros((4, 4))
    assert quadratic(b, h, 2) == (0, 1)
    h[0, 1] = h[1, 0] = 1.0
    assert quadratic(b, h, 2) == (0, 2)
    assert quadratic(b, h, 2, first=1) == (1, 2)
    assert quadratic(b, h, 2, first=1, last=1) == (1, 2)


@pytest.mark.parametrize("count", [8, 15])
def test_thirty_layers(count: int) -> None:
    """All sets are compared; each swap of what is found makes it worse."""
    b, h = drawn(0, 30, 12)
    found = quadratic(np.abs(b) / 10, h, count, last=1)
    assert len(found) == count and found[-1] < 29
    least = value(found, np.abs(b) / 10, h)
    for out in found:
        for more in set(range(29)) - set(found):
            swapped = tuple(sorted({*found, more} - {out}))
            assert value(swapped, np.abs(b) / 10, h) > least


def test_a_hundred_layers_are_searched_the_same_way_each_time() -> None:
    b, h = drawn(1, 100, 40)
    found = quadratic(b, h, 25)
    assert found == quadratic(b, h, 25)
    rng = np.random.default_rng(0)
    random = min(value(tuple(rng.permutation(100)[:25]), b, h) for _ in range(1000))
    assert value(found, b, h) < min(random, value(tuple(np.argsort(b + np.diag(h) / 2)[:25]), b, h))


@pytest.mark.parametrize(
    ("b", "h", "count", "first"),
    [
        (np.zeros(3), np.zeros((3, 2)), 1, 0),
        (np.array([0.0, np.nan]), np.zeros((2, 2)), 1, 0),
        (np.zeros(2), np.full((2, 2), np.inf), 1, 0),
        (np.zeros(3), np.zeros((3, 3)), 0, 0),
        (np.zeros(3), np.zeros((3, 3)), 3, 0),
        (np.zeros(3), np.zeros((3, 3)), 2, 2),
        (np.zeros(3), np.zeros((3, 3)), 1, 4),
    ],
)
def test_what_is_no_choice_is_refused(b: Float64, h: Float64, count: int, first: int) -> None:
    with pytest.raises(PlanError):
        quadratic(b, h, count, first)
