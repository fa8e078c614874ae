"""Rankings of layers: ranks, the lowest layers, and correlations. Pure numpy.

Two kinds of ranks serve two purposes. A selection of the lowest layers needs a strict order, so `rank_lowest` breaks
ties by layer. A correlation must keep ties, so `spearman` gives tied values their average rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avss_dist.stats.catalog import LOWEST_SHARE
from avss_dist.stats.layer_stats import Float64

MIN_VALUES = 3  # values that a correlation needs
MIN_FOR_INTERVAL = 4  # values that the interval of a correlation needs: its variance has number - 3 below
ALL_DEPTH = 1e-9  # share of the variance of ranks, beside depth, that is rounding alone
TWO_SIDED_95 = 1.959964  # the quantile 0.975 of the normal distribution


def count_lowest(layers: int, share: float = LOWEST_SHARE) -> int:
    """Return the number of layers in the lowest ``share``, rounded half to even, at least 1."""
    return max(1, round(share * layers))


def rank_lowest(scores: Float64) -> Float64:
    """Return ranks along the last axis, 1 for the lowest. Of tied layers, the earlier ranks lower. NaN stays NaN."""
    ranks = np.argsort(np.argsort(scores, axis=-1, kind="stable"), axis=-1, kind="stable") + 1.0
    return np.where(np.isnan(scores), np.nan, ranks)


def average_ranks(values: Float64) -> Float64:
    """Return the ranks of finite values along the last axis, starting at 1. Tied values get their mean rank.

    Args:
        values: float64[..., n].
    """
    order = np.argsort(values, axis=-1, kind="stable")
    ordered = np.take_along_axis(values, order, -1)
    place = np.arange(values.shape[-1])
    differs = np.diff(ordered, axis=-1) != 0
    edge = np.ones((*values.shape[:-1], 1), bool)
    begins_tie = np.concatenate([edge, differs], -1)
    ends_tie = np.concatenate([differs, edge], -1)
    # First and last place of the tied values that each value is among.
    first = np.maximum.accumulate(np.where(begins_tie, place, 0), -1)
    from_the_end = np.where(ends_tie, place, values.shape[-1])[..., ::-1]
    last = np.minimum.accumulate(from_the_end, -1)[..., ::-1]
    ranks = np.empty(values.shape)
    np.put_along_axis(ranks, order, (first + last) / 2 + 1, -1)
    return ranks


def spearman(a: Float64, b: Float64) -> float:
    """Return Spearman's rho of two scores, float64[n] each, over the layers at which both are finite.

    Ties have average ranks. The result is NaN for fewer than three such layers, or if one score is constant there.
    """
    both = np.isfinite(a) & np.isfinite(b)
    return float(_correlate_ranks(a[both], b[both]))


def spearman_rows(a: Float64, b: Float64) -> Float64:
    """Return Spearman's rho of every row of two arrays of scores, float64[rows, n] each. See `spearman`."""
    rho = _correlate_ranks(a, b)
    for row in np.flatnonzero(~np.isfinite(a + b).all(axis=1)):
        rho[row] = spearman(a[row], b[row])
    return rho


def _correlate_ranks(a: Float64, b: Float64) -> Float64:
    """Return the correlation of the ranks of finite values along the last axis.

    Doubled average ranks are integers, so that the sums over them are exact.
    """
    number = a.shape[-1]
    if number < MIN_VALUES:
        return np.full(a.shape[:-1], np.nan)
    centered_a = 2 * average_ranks(a) - (number + 1)
    centered_b = 2 * average_ranks(b) - (number + 1)
    products = (centered_a * centered_b).sum(axis=-1)
    squares_a = (centered_a**2).sum(axis=-1)
    squares_b = (centered_b**2).sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho: Float64 = products / np.sqrt(squares_a * squares_b)
    return rho


def spearman_interval(rho: float, number: int) -> tuple[float, float]:
    """Return the 95% interval of Spearman's rho of ``number`` values: Fisher's z, variance of Bonett and Wright.

    The ends are ``tanh(atanh(rho) -+ 1.96 sqrt((1 + rho^2 / 2) / (number - 3)))`` (Psychometrika 65, 2000). They are
    NaN for fewer than four values.
    """
    if number < MIN_FOR_INTERVAL:
        return np.nan, np.nan
    variance = (1 + rho**2 / 2) / (number - 3)
    half_width = TWO_SIDED_95 * np.sqrt(variance)
    with np.errstate(divide="ignore"):
        center = np.arctanh(rho)
    return float(np.tanh(center - half_width)), float(np.tanh(center + half_width))


def given_depth(rho: Float64, depth_a: Float64, depth_b: Float64) -> Float64:
    """Return the partial correlation of the ranks of two scores given depth, float64[...].

    The result is NaN if one of the scores is the order of depth itself.

    Args:
        rho: float64[...], the correlation of the scores.
        depth_a, depth_b: the correlation of each score with depth, in shapes that broadcast to that of ``rho``.
    """
    unexplained = (1 - depth_a**2) * (1 - depth_b**2)
    with np.errstate(invalid="ignore", divide="ignore"):
        partial = (rho - depth_a * depth_b) / np.sqrt(unexplained)
    return np.where(unexplained > ALL_DEPTH, partial, np.nan)


def depth_correlation(scores: Sequence[float | None]) -> float:
    """Return Spearman's rho of scores, in layer order, with depth. None and NaN mark layers without a score."""
    values = np.array(scores, np.float64)
    return spearman(values, np.arange(len(values), dtype=np.float64))


def align(a: tuple[Float64, Float64], b: tuple[Float64, Float64]) -> tuple[Float64, Float64, bool]:
    """Align two profiles, each (depth, values), at the depths of the one with fewer layers.

    Returns:
        The values of both, and whether one was interpolated linearly in depth.
    """
    depth_a, values_a = a
    depth_b, values_b = b
    if np.array_equal(depth_a, depth_b):
        return values_a, values_b, False
    if len(values_a) <= len(values_b):
        return values_a, np.interp(depth_a, depth_b, values_b), True
    return np.interp(depth_b, depth_a, values_a), values_b, True
