"""Exponents of power laws: against their formula, written down again as a loop."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from avss_dist.tasks.block_search import hill_exponent


def fit(tail: Sequence[float]) -> float:
    """The estimate of Hill from an ascending tail (arXiv 0706.1062, equation 3.1)."""
    return 1 + len(tail) / sum(math.log(x / tail[0]) for x in tail)


@pytest.mark.parametrize("n", [2, 3, 4, 5, 12, 13])
def test_hills_estimate_is_that_of_the_larger_half(n: int) -> None:
    values = np.random.default_rng(n).pareto(1.5, n) + 1
    assert hill_exponent(values) == pytest.approx(fit(sorted(values)[-max(2, n // 2) :]), rel=1e-12)


def test_eigenvalues_that_are_not_positive_are_left_out() -> None:
    values = [8.0, 2.0, 1.0, 4.0]
    expected = pytest.approx(hill_exponent(values), rel=1e-12)
    assert hill_exponent([*values, 0.0, 0.0, 0.0, 0.0, -1.0, -2.0]) == expected
    assert hill_exponent([*values, 0.5, 0.6, 0.7]) != pytest.approx(hill_exponent(values), rel=1e-3)
    assert hill_exponent(values) == pytest.approx(1 + 2 / math.log(2), rel=1e-12)


def test_equal_eigenvalues_have_no_exponent() -> None:
    assert hill_exponent([3.0, 3.0]) == math.inf
    assert hill_exponent([1.0, 1.1]) == pytest.approx(1 + 2 / math.log(1.1), rel=1e-12)
