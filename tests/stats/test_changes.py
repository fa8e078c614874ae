"""Changes between checkpoints: against a slow computation by the formulas, and what is and is not a change."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import sqrt

import numpy as np
import pytest

from avss_dist.stats import changes
from avss_dist.stats.layer_stats import Float64


def simulated(units: int, mu: Float64, seed: int = 0) -> Float64:
    """Return scores by unit, float64[units, points, layers]: a text's own part, and noise of each point."""
    random = np.random.default_rng(seed)
    points, layers = mu.shape
    text = 2 * random.normal(size=(units, 1, layers))
    return mu + text + random.normal(size=(units, points, layers))


def replicates(by_unit: Float64) -> tuple[Float64, Float64]:
    """Return a score that is not linear in the units, of all units and without each: theta and left_out."""
    units = len(by_unit)
    positive = np.exp(by_unit / 10)
    left_out = (positive.sum(axis=0) - positive) / (units - 1)
    return np.log(positive.mean(axis=0)), np.log(left_out)


def values_of(by_unit: Float64) -> Float64:
    return changes.change_values(*replicates(by_unit))


def slow_tau(values: list[float]) -> float:
    number = len(values)
    total = sum(values)
    q = sum(value**2 for value in values) - total**2 / number
    return total / sqrt(number * q / (number - 1))


def slow_change(scores: Float64, t: int, layer: int) -> float:
    """Return how far a layer moves away from the mean of all layers, from one run to the next."""
    before = scores[t, layer] - scores[t].mean()
    after = scores[t + 1, layer] - scores[t + 1].mean()
    return after - before


def slow_values(theta: Float64, left_out: Float64, t: int, layer: int) -> list[float]:
    """Return the pseudo-value of each unit."""
    number = len(left_out)
    of_all = number * slow_change(theta, t, layer)
    return [of_all - (number - 1) * slow_change(without, t, layer) for without in left_out]


def slow_maximum(values: list[list[float]], signs: Sequence[int]) -> float:
    """Return the largest statistic of several tests, after the units have changed their signs."""
    statistics = []
    for of_test in values:
        flipped = np.multiply(signs, of_test)
        statistics.append(abs(slow_tau(flipped.tolist())))
    return max(statistics)


def slow_p(values: list[list[float]]) -> list[float]:
    """Return the step-down p-values of tests by all signs, from the values of each test."""
    observed = [abs(slow_tau(of_test)) for of_test in values]
    flips = list(product([1, -1], repeat=len(values[0])))
    remaining = list(np.argsort(observed)[::-1])
    p = [0.0] * len(values)
    before = 0.0
    while remaining:
        test = remaining[0]
        maxima = np.array([slow_maximum([values[other] for other in remaining], signs) for signs in flips])
        is_reached = maxima >= observed[test] * (1 - 1e-9)
        before = max(before, is_reached.mean())
        p[test] = before
        remaining.remove(test)
    return p


def test_tau_and_p_are_those_of_the_formulas() -> None:
    mu = np.zeros((3, 4))
    mu[1:, 2] = 3
    theta, left_out = replicates(simulated(6, mu))
    pseudo = changes.change_values(theta, left_out)
    values = []
    for t in range(2):
        values += [slow_values(theta, left_out, t, layer) for layer in range(4)]
    taus = [slow_tau(of_test) for of_test in values]
    np.testing.assert_allclose(pseudo.reshape(6, -1).T, values, rtol=1e-9)
    np.testing.assert_allclose(changes.studentized(pseudo).ravel(), taus, rtol=1e-9)
    np.testing.assert_allclose(changes.adjusted_p(pseudo).ravel(), slow_p(values), rtol=1e-12)


@pytest.mark.parametrize("units", [8, 12])
def test_the_order_of_the_units_does_not_matter(units: int) -> None:
    pseudo = values_of(simulated(units, np.zeros((4, 5))))
    permuted = pseudo[np.random.default_rng(1).permutation(units)]
    np.testing.assert_allclose(changes.adjusted_p(permuted), changes.adjusted_p(pseudo), rtol=1e-12)


@pytest.mark.parametrize("units", [8, 32])
def test_planted_changes_are_found_and_constant_layers_are_not(units: int) -> None:
    mu = np.zeros((5, 6))
    mu[3:, 1] = 10
    mu[3:, 4] = -10
    is_changed = changes.adjusted_p(values_of(simulated(units, mu))) <= changes.LEVEL
    planted = np.zeros((4, 6), bool)
    planted[2, [1, 4]] = True
    np.testing.assert_array_equal(is_changed, planted)


def test_eight_units_give_no_p_below_one_in_128() -> None:
    mu = np.zeros((2, 3))
    mu[1, 0] = 50
    p = changes.adjusted_p(values_of(simulated(8, mu)))
    assert p.min() == 1 / 128
    assert changes.smallest_p(8) == 1 / 128


def test_more_units_draw_the_same_signs_each_time_the_true_ones_among_them() -> None:
    signs = changes.sign_flips(13)
    assert signs.shape == (changes.DRAWS, 13)
    assert (signs[0] == 1).all()
    np.testing.assert_array_equal(signs, changes.sign_flips(13))


def test_all_signs_of_few_units_are_there_once_but_for_the_sign_of_the_whole() -> None:
    signs = changes.sign_flips(4)
    assert len(np.unique(np.vstack([signs, -signs]), axis=0)) == 16


def test_equal_checkpoints_have_no_change() -> None:
    by_unit = np.repeat(simulated(8, np.zeros((1, 4))), 3, axis=1)
    pseudo = values_of(by_unit)
    assert (changes.studentized(pseudo) == 0).all()
    assert (changes.adjusted_p(pseudo) == 1).all()


def test_a_difference_by_rounding_is_no_change() -> None:
    by_unit = np.repeat(simulated(8, np.zeros((1, 4))), 2, axis=1)
    theta, left_out = replicates(by_unit)
    rounding = 1 + 1e-15 * np.arange(4)
    theta[1] *= rounding
    left_out[:, 1] *= rounding
    assert (changes.adjusted_p(changes.change_values(theta, left_out)) == 1).all()


def test_a_change_that_is_the_same_in_all_units_has_no_noise_to_be_compared_with() -> None:
    assert changes.adjusted_p(np.full((8, 1), 3.0)) == [1.0]
    assert changes.studentized(np.full((8, 1), 3.0)) == [0.0]


def alike(units: int, correlation: float) -> Float64:
    """Return an autoregressive process over units, float64[units, 2, 12]."""
    values = np.random.default_rng(3).normal(size=(units, 2, 12))
    for unit in range(1, units):
        values[unit] = correlation * values[unit - 1] + sqrt(1 - correlation**2) * values[unit]
    return values


def test_units_without_a_correlation_need_no_blocks() -> None:
    assert changes.independent_block_size(alike(32, 0.0)) == 1


def test_neighbours_that_correlate_are_put_into_blocks() -> None:
    size = changes.independent_block_size(alike(128, 0.4))
    assert size is not None
    assert size > 1


def test_neighbours_that_correlate_have_no_blocks_where_units_are_few() -> None:
    assert changes.independent_block_size(alike(12, 0.8)) is None


def test_blocks_are_of_neighbours_and_not_smaller_than_asked() -> None:
    block = changes.block_of_units(21, 2)
    assert (np.diff(block) >= 0).all()
    assert set(np.bincount(block)) == {2, 3}


def ranks_moved(mu: Float64) -> list[list[int]]:
    """Return the points and layers whose ranks moved, where every change is taken to be real."""
    by_unit = simulated(16, mu)
    theta, left_out = replicates(by_unit)
    moved = changes.moved_ranks(theta, left_out, np.ones((len(mu) - 1, mu.shape[1]), bool))
    return np.argwhere(moved).tolist()


def test_layers_that_pass_each_other_have_moved() -> None:
    assert ranks_moved(np.array([[0.0, 10, 30], [10, 0, 30]])) == [[0, 0], [0, 1]]


def test_a_layer_that_moved_and_passed_none_keeps_its_rank() -> None:
    assert ranks_moved(np.array([[0.0, 10, 30], [0, 20, 30]])) == []


def test_a_layer_that_passed_one_like_it_keeps_its_rank() -> None:
    """Layers 0 and 1 have the same true score at first, so that one of them seems to pass the other."""
    mu = np.array([[0.0, 0, 30], [0, 10, 30], [10, 0, 30]])
    assert [place for place in ranks_moved(mu) if place[0] == 0] == []


def test_a_rank_of_a_layer_whose_score_did_not_move_is_not_marked() -> None:
    theta, left_out = replicates(simulated(16, np.array([[0.0, 10, 30], [10, 0, 30]])))
    is_changed = np.array([[True, False, False]])
    np.testing.assert_array_equal(changes.moved_ranks(theta, left_out, is_changed), is_changed)


def test_the_interval_of_a_rank_correlation_is_around_it() -> None:
    mu = np.random.default_rng(2).normal(size=(2, 20))
    rho, low, high = changes.neighbour_agreement(*replicates(simulated(16, mu)))[:, 0]
    assert low < rho < high


def test_what_the_text_does_to_both_points_alike_does_not_widen_the_interval() -> None:
    """Both points have the same order in every unit, so that the correlation is 1 without any of them."""
    by_unit = simulated(16, np.zeros((1, 20)))
    theta, left_out = replicates(np.concatenate([by_unit, by_unit], axis=1))
    rho, low, high = changes.neighbour_agreement(theta, left_out)[:, 0]
    assert rho == 1
    assert np.isnan([low, high]).all()


def test_the_lowest_layers_are_those_of_the_last_point_from_where_they_stay() -> None:
    lowest_0 = [1.0, 2, 3, 4]
    lowest_1 = [2.0, 1, 3, 4]
    resamples = [
        [lowest_0, lowest_0, lowest_0],
        [lowest_0, lowest_1, lowest_0],
        [lowest_0, lowest_1, lowest_1],
        [lowest_1, lowest_0, lowest_1],
    ]
    np.testing.assert_array_equal(changes.lowest_as_last(np.array(resamples)), [0.25, 0.5, 1])


def test_skewness_is_that_of_scipy() -> None:
    from scipy.stats import skew

    values = np.random.default_rng(0).exponential(size=(16, 3))
    np.testing.assert_allclose(changes.skewness(values), skew(values), rtol=1e-12)
    assert changes.skewness(np.ones((8, 1))) == [0]
