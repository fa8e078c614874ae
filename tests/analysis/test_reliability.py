"""How far a measurement can be trusted: against second measurements, and counts by hand."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from avss_dist.analysis.reliability import FEWEST_SETS, misranked, reliability, sets_correlation
from avss_dist.stats.rankings import spearman


@pytest.mark.parametrize("noise", [0.5, 2.0])
def test_reliability_is_what_a_second_measurement_would_agree_by(noise: float) -> None:
    """Layers of known damage, measured on sequences that differ: many second measurements of the same size."""
    rng = np.random.default_rng(1)
    damage = rng.normal(size=30)
    measured = damage + noise * rng.normal(size=(400, 16, 30))
    stepped_up = [reliability(samples) for samples in measured[:40]]
    sums = measured.sum(axis=1)
    again = [spearman(a, b) for a, b in zip(sums[0::2], sums[1::2], strict=True)]
    assert np.mean(stepped_up) == pytest.approx(np.mean(again), abs=0.03)
    assert reliability(measured[0]) == reliability(measured[0])


def test_few_sequences_have_no_reliability() -> None:
    assert np.isnan(reliability(np.ones((3, 8))))
    assert np.isnan(reliability(np.zeros((0, 8))))


def test_pairs_in_the_wrong_order_are_counted() -> None:
    truth = np.array([1.0, 2.0, 3.0, 4.0, np.nan])
    assert misranked(np.array([1.0, 2.0, 3.0, 4.0, 0.0]), truth) == 0
    assert misranked(np.array([4.0, 3.0, 2.0, 1.0, 0.0]), truth) == 1
    assert misranked(np.array([2.0, 1.0, 3.0, 4.0, 0.0]), truth) == pytest.approx(1 / 6)
    assert misranked(np.array([1.0, 1.0, 3.0, 4.0, 0.0]), truth) == 0  # a tie orders nothing
    assert misranked(np.array([1.0, 1.0, 1.0, 1.0, 0.0]), truth) is None


def test_sets_are_ordered_by_their_sums() -> None:
    score = np.array([0.0, 1.0, 2.0, 4.0, 8.0])
    sets = {pair: float(score[list(pair)].sum()) ** 3 for pair in combinations(range(5), 2)}
    assert sets_correlation(score, sets) == pytest.approx(1.0)
    assert sets_correlation(-score, sets) == pytest.approx(-1.0)
    few = dict(list(sets.items())[: FEWEST_SETS - 1])
    assert np.isnan(sets_correlation(score, few)) and np.isnan(sets_correlation(score, {(0, 1): 0.1}))
