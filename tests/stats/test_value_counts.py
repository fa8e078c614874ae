"""Counts of signed values at edges: shares, sizes and the mode, against the values themselves."""

from __future__ import annotations

import numpy as np
import pytest

from avss_dist.stats.value_counts import EDGES, mode_of, share_within, size_of_share


def counted(values: np.ndarray) -> np.ndarray:
    return np.array([(values <= edge).sum() for edge in EDGES], np.float64)


def test_edges_are_eight_an_octave_of_either_sign() -> None:
    assert len(EDGES) == 2 * 273 + 1 and (np.diff(EDGES) > 0).all() and EDGES[-1] == np.inf
    assert (EDGES[0], EDGES[272], EDGES[273], EDGES[-2]) == (-(2.0**14), -(2.0**-20), 2.0**-20, 2.0**14)
    assert EDGES[274] / EDGES[273] == pytest.approx(2 ** (1 / 8), rel=1e-12)


def test_shares_are_exact_at_edges_and_linear_in_between() -> None:
    values = np.append(np.random.default_rng(0).normal(0.2, 1.0, 2000), [15_000.0, 15_900.0, 20_000.0, -20_000.0])
    counts = counted(values)
    for size in (2.0**-3, 1.0, 2.0 ** (9 / 8), 2.0**14):
        assert share_within(counts, size) == pytest.approx(((values > -size) & (values <= size)).mean(), rel=1e-12)
    assert share_within(counts, 1.5, 2.5) == pytest.approx(((values > 1) & (values <= 4)).mean(), rel=1e-12)
    ones = counted(np.ones(4))
    below = 2.0 ** (-1 / 8)
    assert share_within(ones, below + 0.25 * (1 - below)) == pytest.approx(0.25, rel=1e-12)


def test_the_size_of_a_share_is_the_least_that_holds_it() -> None:
    counts = counted(np.repeat([1.0, 4.0, 20_000.0], [100, 100, 50]))
    assert size_of_share(counts, 0.4) == pytest.approx(1.0, rel=1e-9)
    assert size_of_share(counts, 0.8) == pytest.approx(4.0, rel=1e-9)
    assert size_of_share(counts, 0.4, 1.5) == pytest.approx(0.5 + (1 - 2.0 ** (-1 / 8)), rel=1e-9)
    assert size_of_share(counts, 0.0) == 0.0
    assert size_of_share(counts, 0.9) == EDGES[-2]
    assert size_of_share(counted(np.linspace(-1, 1, 101)), 0.5) == pytest.approx(0.5, abs=0.02)


def test_the_mode_is_the_middle_of_the_narrowest_tenth() -> None:
    spread = np.linspace(-8, 8, 400)
    spread = spread[(spread <= 1) | (spread > 2 ** (1 / 8))]
    values = np.concatenate([spread, np.full(600, 1.05), np.full(50, 20_000.0)])
    width = (2 ** (1 / 8) - 1) * 0.1 * len(values) / 600
    assert mode_of(counted(values)) == pytest.approx(1 + width / 2, rel=1e-9)
    negated = np.where(values < 1000, -values, values)
    assert mode_of(counted(negated)) == pytest.approx(-(2 ** (1 / 8)) + width / 2, rel=1e-9)
