"""Changes of layer scores between neighbouring checkpoints, and differences of seeds, beyond the choice of text.

Pure numpy.

All checkpoints read the same rows, so their shards are paired: a shard that is left out is left out of all of them, and
what a row does to every checkpoint alike cancels. A *unit* is a shard, or a block of neighbouring shards.

========  ================================================================================================
symbol    meaning
========  ================================================================================================
theta     score of a layer at a point (a checkpoint); of AVSS its logarithm
z         theta minus its mean over the layers of the point
d         z[t + 1, l] - z[t, l], the change of layer l after point t
p_s       S d - (S - 1) d^(-s), the pseudo-value of unit s of S, where d^(-s) is d without the unit
Q         sum p_s^2 - (sum p_s)^2 / S
tau       sum p_s / sqrt(S Q / (S - 1)), which is Student's t of the pseudo-values
========  ================================================================================================
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avss_dist.stats.intervals import BOOTSTRAP_BLOCKS, BOOTSTRAP_SEED, MINIMUM_UNITS, jackknife_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import count_lowest, rank_lowest, spearman_rows

Bools = NDArray[np.bool_]

LEVEL = 0.05
"""Probability of one or more findings in a series without a change."""
ALL_SIGNS = 12
"""Number of units up to which all signs are tried."""
DRAWS = 4096
"""Number of sign vectors that are drawn for more units, the unchanged signs among them: as many as 12 units have."""
ROUNDING = 1e-12
"""Relative difference that is rounding."""
CORRELATED = 0.02
"""P-value up to which neighbouring units are taken to correlate."""
WEAK = 0.1
"""Correlation of neighbours that hardly matters: tau grows by a tenth."""
ORDERS = 1000
"""Number of orders of units that the correlation of neighbours is compared with, the true one among them."""
SKEWED = 1.0
"""Absolute skewness of pseudo-values above which their signs are hardly exchangeable."""
NULL_CELLS = 4_000_000
"""Number of values of the null distribution that are in memory at a time."""


def centered(theta: Float64) -> Float64:
    """Return z: scores minus their mean over layers, which are the last axis. Same shape as ``theta``."""
    return theta - theta.mean(axis=-1, keepdims=True)


def differences(theta: Float64) -> Float64:
    """Return d, the changes of centered scores between neighbouring points: z[t + 1, l] - z[t, l].

    Args:
        theta: float64[..., points, layers].

    Returns:
        float64[..., points - 1, layers].
    """
    return np.diff(centered(theta), axis=-2)


def pseudo_values(value: Float64, left_out: Float64, size: float) -> Float64:
    """Return the pseudo-values of a statistic: p_s = S value - (S - 1) left_out[s].

    Args:
        value: the statistic of all units, float64[...].
        left_out: the statistic without each unit, float64[units, ...].
        size: size of the numbers that the statistic was computed from. Pseudo-values that are no larger in any unit
            than the rounding of such numbers are 0.

    Returns:
        float64[units, ...].
    """
    units = len(left_out)
    pseudo = units * value - (units - 1) * left_out
    is_rounding = np.abs(pseudo).max(axis=0) <= ROUNDING * units * size
    return np.where(is_rounding, 0.0, pseudo)


def change_values(theta: Float64, left_out: Float64) -> Float64:
    """Return the pseudo-values of the changes d of every layer after every point but the last.

    Args:
        theta: float64[points, layers].
        left_out: theta without each unit, the same unit at all points, float64[units, points, layers].

    Returns:
        float64[units, points - 1, layers].
    """
    return pseudo_values(differences(theta), differences(left_out), np.abs(theta).max(initial=0.0))


def studentized(pseudo: Float64) -> Float64:
    """Return tau = sum p_s / sqrt(S Q / (S - 1)) with Q = sum p_s^2 - (sum p_s)^2 / S. It is 0 where Q is 0.

    Args:
        pseudo: pseudo-values, float64[units, ...].

    Returns:
        float64[...].
    """
    units = len(pseudo)
    explained = _explained(np.ones((1, units)), pseudo.reshape(units, -1))[0]
    sizes = np.sqrt((units - 1) * explained / (1 - explained))
    tau: Float64 = sizes.reshape(pseudo.shape[1:]) * np.sign(pseudo.sum(axis=0))
    return tau


def _explained(signs: Float64, pseudo: Float64) -> Float64:
    """Return the share r = (sum x_s p_s)^2 / (S sum p_s^2) of the sum of squares that lies in the mean.

    It orders sign vectors and tests as |tau| does: tau^2 = (S - 1) r / (1 - r). Where Q is 0, so that r is 1 but for
    rounding, there is no spread to compare a change with. There it is 0, as for a tau of 0.

    Args:
        signs: x, float64[flips, units].
        pseudo: p, float64[units, tests].

    Returns:
        float64[flips, tests], at least 0 and less than 1.
    """
    squares = len(pseudo) * np.square(pseudo).sum(axis=0)
    sums = np.square(signs @ pseudo)
    explained = np.divide(sums, squares, out=np.zeros(sums.shape), where=squares > 0)
    return np.where(1 - explained <= ROUNDING, 0.0, explained)


def sign_flips(units: int) -> Float64:
    """Return sign vectors of the null distribution, float64[flips, units] of +1 and -1. The first one is all +1.

    Up to `ALL_SIGNS` units, these are all that differ in more than the sign of the whole vector, which changes no
    |tau|: 2^(units - 1). For more units, they are the first one and seeded draws, `DRAWS` in all.
    """
    if units <= ALL_SIGNS:
        numbers = np.arange(2 ** (units - 1))[:, None]
        is_negative = (numbers >> np.arange(units)) & 1
    else:
        random = np.random.default_rng(BOOTSTRAP_SEED)
        is_negative = random.integers(0, 2, (DRAWS, units))
        is_negative[0] = 0
    signs: Float64 = 1 - 2 * is_negative.astype(np.float64)
    return signs


def smallest_p(units: int) -> float:
    """Return the smallest p-value that a number of units can give."""
    if units <= ALL_SIGNS:
        return float(0.5 ** (units - 1))
    return 1 / DRAWS


def adjusted_p(pseudo: Float64) -> Float64:
    """Return p-values of tests of a mean of 0, adjusted for their number by the maximum of |tau|, step-down.

    Under the null hypothesis, the pseudo-values of all tests in a unit may change their signs together. The p-value of
    the test with the k-th largest |tau| is the share of `sign_flips` under which the largest |tau| of that test
    and of all with a smaller one is at least as large, and is no smaller than that of the test before it (Westfall and
    Young, 1993, algorithm 4.1). The probability of one or more p-values of at most x among tests without an effect is
    at most x, if their signs are exchangeable.

    Args:
        pseudo: pseudo-values, float64[units, ...].

    Returns:
        float64[...]. The p-value is 1 where tau is 0.
    """
    units = len(pseudo)
    flat = pseudo.reshape(units, -1)
    signs = sign_flips(units)
    observed = _explained(signs[:1], flat)[0]
    order = np.argsort(-observed, kind="stable")
    ordered = flat[:, order]
    reached = observed[order] * (1 - ROUNDING)
    exceeding = np.zeros(len(order))
    step = max(1, NULL_CELLS // max(1, len(order)))
    for start in range(0, len(signs), step):
        null = _explained(signs[start : start + step], ordered)
        largest = np.maximum.accumulate(null[:, ::-1], axis=1)[:, ::-1]
        exceeding += (largest >= reached).sum(axis=0)
    p = np.empty(len(order))
    p[order] = np.maximum.accumulate(exceeding / len(signs))
    return p.reshape(pseudo.shape[1:])


def skewness(pseudo: Float64) -> Float64:
    """Return the skewness of pseudo-values over units, float64[...]. It is 0 where they do not differ.

    Args:
        pseudo: float64[units, ...].
    """
    deviations = pseudo - pseudo.mean(axis=0)
    variance = np.square(deviations).mean(axis=0)
    third = (deviations**3).mean(axis=0)
    return np.divide(third, variance**1.5, out=np.zeros(variance.shape), where=variance > 0)


def neighbours_correlate(pseudo: Float64) -> bool:
    """Whether the pseudo-values of neighbouring units correlate more than those of units in a random order.

    The correlation is the mean over tests of sum_s e_s e_(s + 1) / sum_s e_s^2, where e_s are deviations from the mean
    over units. Without a correlation, it is -1 / units, from which `WEAK` ones are told. Its p-value is the share of
    `ORDERS` orders in which it is at least as large.

    Args:
        pseudo: float64[units, ...].
    """
    units = len(pseudo)
    deviations = (pseudo - pseudo.mean(axis=0)).reshape(units, -1)
    spread = np.sqrt(np.square(deviations).sum(axis=0))
    relative = np.divide(deviations, spread, out=np.zeros(deviations.shape), where=spread > 0)
    products = relative @ relative.T
    random = np.random.default_rng(BOOTSTRAP_SEED)
    orders = random.permuted(np.tile(np.arange(units), (ORDERS, 1)), axis=1)
    orders[0] = np.arange(units)
    correlations = products[orders[:, :-1], orders[:, 1:]].sum(axis=1)
    if correlations[0] + 1 / units <= WEAK:
        return False
    reached = correlations[0] - ROUNDING
    return bool((correlations >= reached).mean() <= CORRELATED)


def block_of_units(units: int, size: int) -> NDArray[np.int64]:
    """Return the block of each unit, int64[units], for blocks of at least ``size`` neighbouring units.

    There are at most `BOOTSTRAP_BLOCKS`.
    """
    blocks = min(max(1, units // size), BOOTSTRAP_BLOCKS)
    return np.arange(units) * blocks // max(1, units)


def independent_block_size(pseudo: Float64) -> int | None:
    """Return the smallest size, a power of 2, of blocks of neighbouring units that are about independent.

    Args:
        pseudo: pseudo-values by unit, float64[units, ...]. That of a block is about the mean over its units.

    Returns:
        None if neighbours of all numbers of blocks from `MINIMUM_UNITS` on correlate.
    """
    units = len(pseudo)
    size = 1
    while units // size >= MINIMUM_UNITS:
        block = block_of_units(units, size)
        starts = np.flatnonzero(np.diff(block, prepend=-1))
        sums = np.add.reduceat(pseudo, starts, axis=0)
        counts = np.bincount(block).reshape(-1, *[1] * (pseudo.ndim - 1))
        if not neighbours_correlate(sums / counts):
            return size
        size *= 2
    return None


def moved_ranks(theta: Float64, left_out: Float64, is_changed: Bools) -> Bools:
    """Return which ranks moved beyond the choice of text, bool[points - 1, layers].

    A rank moved if the score of its layer changed, and the layer passed another one from which its score differs at
    both points. Differences of two layers at a point are tested as changes are, adjusted for all that are tested.

    Args:
        theta: float64[points, layers].
        left_out: float64[units, points, layers].
        is_changed: whether the score of a layer changed after a point, bool[points - 1, layers].
    """
    above = theta[:, :, None] > theta[:, None, :]
    below = theta[:, :, None] < theta[:, None, :]
    passed = (above[:-1] & below[1:]) | (below[:-1] & above[1:])
    point, layer, other = np.nonzero(passed & is_changed[:, :, None])
    moved = np.zeros(is_changed.shape, bool)
    if not len(point):
        return moved
    # A layer has the difference to another one at the point before and at the point after.
    at = np.stack([point, point + 1])
    difference = theta[at, layer] - theta[at, other]
    without_unit = left_out[:, at, layer] - left_out[:, at, other]
    p = adjusted_p(pseudo_values(difference, without_unit, np.abs(theta).max()))
    differ = (p <= LEVEL).all(axis=0)
    moved[point[differ], layer[differ]] = True
    return moved


def neighbour_agreement(theta: Float64, left_out: Float64) -> Float64:
    """Return the rank correlation of neighbouring points and its 95% interval, float64[3, points - 1].

    The rows are Spearman's rho and the ends of its interval: `jackknife_interval` of Fisher's z = atanh(rho) with the
    same unit left out of both points. The ends are NaN if rho, or one without a unit, is 1 or -1.

    Args:
        theta: float64[points, layers].
        left_out: float64[units, points, layers].
    """
    rho = spearman_rows(theta[:-1], theta[1:])
    without_unit = [spearman_rows(values[:-1], values[1:]) for values in left_out]
    ends = jackknife_interval(rho, np.array(without_unit), scale="fisher")
    return np.vstack([rho, ends])


def lowest_as_last(resamples: Float64) -> Float64:
    """Return the share of joint resamples in which the lowest 25% are those of the last point from a point on.

    Args:
        resamples: scores with the same units resampled at all points, float64[resamples, points, layers].

    Returns:
        float64[points], which does not fall. It is 1 at the last point.
    """
    is_lowest = rank_lowest(resamples) <= count_lowest(resamples.shape[-1])
    is_as_last = (is_lowest == is_lowest[:, -1:]).all(axis=-1)
    stays = np.logical_and.accumulate(is_as_last[:, ::-1], axis=1)[:, ::-1]
    share: Float64 = stays.mean(axis=0)
    return share


def seed_pairs(seeds: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first and the second place of every two seeds, int64[pairs] each: 0 and 1, 0 and 2, 1 and 2."""
    return np.triu_indices(seeds, 1)


def seed_differences(theta: Float64) -> Float64:
    """Return the differences of centered scores between every two seeds at a point: z[b, t, l] - z[a, t, l].

    Args:
        theta: float64[..., seeds, points, layers].

    Returns:
        float64[..., pairs, points, layers], in the order of `seed_pairs`.
    """
    z = centered(theta)
    first, second = seed_pairs(theta.shape[-3])
    return z[..., second, :, :] - z[..., first, :, :]


def seed_values(theta: Float64, left_out: Float64) -> Float64:
    """Return the pseudo-values of `seed_differences`.

    Args:
        theta: float64[seeds, points, layers].
        left_out: theta without each unit, the same unit in all seeds, float64[units, seeds, points, layers].

    Returns:
        float64[units, pairs, points, layers].
    """
    return pseudo_values(seed_differences(theta), seed_differences(left_out), np.abs(theta).max(initial=0.0))


def lowest_in_all(theta: Float64) -> Bools:
    """Return which layers are among the lowest 25% of every seed, bool[..., points, layers].

    Args:
        theta: float64[..., seeds, points, layers].
    """
    is_lowest = rank_lowest(theta) <= count_lowest(theta.shape[-1])
    return np.logical_and.reduce(is_lowest, axis=-3)
