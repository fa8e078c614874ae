"""Exponents of power laws: against their formulas, written down again as loops."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from avss_dist.stats.power_law import hill_exponent, ks_exponent


def fit(tail: Sequence[float]) -> float:
    """The estimate of Hill from an ascending tail (arXiv 0706.1062, equation 3.1)."""
    total = sum(math.log(x / tail[0]) for x in tail)
    return 1 + len(tail) / total if total else math.inf


def best_fit(values: Sequence[float]) -> float:
    """The estimate from the tail that lies nearest to its power law (section 3.3 there)."""
    ordered, n = sorted(values), len(values)
    fits = []
    for m in range(max(2, n // 10), n + 1):
        tail = ordered[n - m :]
        exponent = fit(tail)
        if exponent < math.inf:
            law = [1 - (x / tail[0]) ** (1 - exponent) for x in tail]
            fits.append((max(abs(i / m - p) for i, p in enumerate(law)), exponent))
    return min(fits, default=(math.inf, math.inf))[1]


@pytest.mark.parametrize("n", [2, 3, 4, 5, 12, 13])
def test_hills_estimate_is_that_of_the_larger_half(n: int) -> None:
    values = np.random.default_rng(n).pareto(1.5, n) + 1
    half = sorted(values)[-max(2, n // 2) :]
    assert hill_exponent(values) == pytest.approx(fit(half), rel=1e-12)
    assert hill_exponent(values, 2) == pytest.approx(fit(sorted(values)[-2:]), rel=1e-12)


def test_eigenvalues_that_are_not_positive_are_left_out() -> None:
    values = [8.0, 2.0, 1.0, 4.0]
    for exponent in (hill_exponent, ks_exponent):
        assert exponent([*values, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0]) == pytest.approx(exponent(values), rel=1e-12)
        assert exponent([*values, 0.5, 0.6, 0.7]) != pytest.approx(exponent(values), rel=1e-3)
    assert hill_exponent(values) == pytest.approx(1 + 2 / math.log(2), rel=1e-12)


def test_equal_eigenvalues_have_no_exponent() -> None:
    assert hill_exponent([3.0, 3.0]) == math.inf and ks_exponent([3.0] * 5) == math.inf
    assert hill_exponent([1.0, 1.1]) == pytest.approx(1 + 2 / math.log(1.1), rel=1e-12)
    assert ks_exponent([0.1] + [1.0] * 14) == pytest.approx(1 + 15 / (14 * math.log(10)), rel=1e-12)


@pytest.mark.parametrize("n", [2, 3, 5, 19, 20, 21, 30, 33, 44, 110])
def test_the_chosen_tail_is_the_one_nearest_to_its_power_law(n: int) -> None:
    rng = np.random.default_rng(n)
    for spread in (0.2, 1.0, 3.0):
        for _ in range(30):
            values = np.exp(spread * rng.normal(size=n))
            assert ks_exponent(values) == pytest.approx(best_fit(values), rel=1e-9)
            assert ks_exponent([*values, *[0.0] * 10 * n]) == ks_exponent(values)
    law = np.append(np.linspace(0.01, 1, n), (1 - (np.arange(n) + 0.5) / n) ** (-1 / 1.5))
    assert ks_exponent(law) == pytest.approx(best_fit(law), rel=1e-9)
