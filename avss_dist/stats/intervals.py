"""Confidence intervals of statistics over independent units (shards, samples, pairs, permutations), and resampling.

One method serves every statistic: the delete-one jackknife estimates the standard error and the skewness, Student's t
gives the multiple, Hall's transformation corrects it for skewness, and ratios and probabilities are treated on the log
and logit scales. ``docs/results/cost.md`` has its coverage.
"""

from __future__ import annotations

from collections.abc import Callable
from math import nan, sqrt
from typing import NamedTuple

import numpy as np

from avss_dist.core.text import count_of
from avss_dist.stats.layer_stats import Float64

BOOTSTRAP_SEED = 0

BOOTSTRAP_RESAMPLES = 1000
BOOTSTRAP_BLOCKS = 100  # shards beyond this are resampled in blocks of consecutive ones
INTERVAL = 0.95
MINIMUM_UNITS = 8  # shards, samples, pairs or permutations that an interval needs: with fewer, none covers reliably


def _unchanged(values: Float64) -> Float64:
    return values


def _log_odds(probabilities: Float64) -> Float64:
    return np.log(probabilities / (1 - probabilities))


def _probabilities(log_odds: Float64) -> Float64:
    return 1 / (1 + np.exp(-log_odds))


class Scale(NamedTuple):
    """Scale on which an interval is computed.

    Attributes:
        transform: takes values to the scale.
        invert: takes values of the scale back.
    """

    transform: Callable[[Float64], Float64]
    invert: Callable[[Float64], Float64]


SCALES = {
    "linear": Scale(_unchanged, _unchanged),
    "log": Scale(np.log, np.exp),
    "logit": Scale(_log_odds, _probabilities),
    "fisher": Scale(np.arctanh, np.tanh),
}
"""Scales by name."""
SKEWNESS_COST = 2.0
"""Loss of degrees of freedom by skewness. With this value, the intervals cover every population of the benchmark."""
SYMMETRIC = 1e-6
"""Skewness below which none is corrected, because the cube root would lose all digits."""


def why_no_interval(shards: int) -> str | None:
    """Return the reason why a run with this number of shards has no intervals, or None if it has them."""
    if shards >= MINIMUM_UNITS:
        return None
    return (
        f"No interval: {count_of(shards, 'shard')}, {MINIMUM_UNITS} are needed; raise --max-sequences or lower "
        "--sequences-per-shard, or use a longer text."
    )


def bootstrap_weights(number: int) -> Float64:
    """Return the count of each of ``number`` units in each bootstrap resample, float64[resamples, number]. Seeded."""
    random = np.random.default_rng(BOOTSTRAP_SEED)
    probabilities = np.full(number, 1 / number)
    return random.multinomial(number, probabilities, BOOTSTRAP_RESAMPLES).astype(np.float64)


def left_out_weights(number: int) -> Float64:
    """Return the weights that leave out one group of units at a time, float64[groups, number].

    Up to `BOOTSTRAP_BLOCKS` units, each is a group of its own. More units form that many groups of consecutive units.
    """
    groups = min(number, BOOTSTRAP_BLOCKS)
    group_of_unit = np.arange(number) * groups // max(number, 1)
    stays = group_of_unit != np.arange(groups)[:, None]
    return stays.astype(np.float64)


def jackknife_interval(
    value: Float64, left_out: Float64, *, scale: str = "linear", confidence: float = INTERVAL
) -> Float64:
    """Return the lower and upper ends of a statistic's confidence interval, float64[2, ...].

    The standard error is the jackknife's. The studentized statistic is corrected for the skewness of the jackknife's
    pseudo-values by the monotone cubic of Hall (1992), "On the removal of skewness by transformation", Journal of the
    Royal Statistical Society B 54, whose quantiles are Student's. Their n - 1 degrees of freedom are divided by
    1 + `SKEWNESS_COST` times the absolute skewness: a skewed sample says less about its own spread.

    Both ends are NaN if there are fewer than `MINIMUM_UNITS` units, or if the statistic or one of its leave-one-out
    values is not finite on the scale.

    Args:
        value: the statistic of all units, float64[...].
        left_out: the statistic without each unit (or group of units), float64[units, ...].
        scale: ``log`` for positive statistics such as ratios, ``logit`` for probabilities, ``fisher`` for correlations,
            ``linear`` for means and differences.
        confidence: the nominal coverage.
    """
    from scipy.special import stdtrit

    number = len(left_out)
    if number < MINIMUM_UNITS:
        return np.full((2, *np.shape(value)), nan)
    transform, invert = SCALES[scale]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        center = transform(np.asarray(value, np.float64))
        replicates = transform(left_out)
        pseudo = (number - 1) * (replicates.mean(axis=0) - replicates)
        variance = np.square(pseudo).mean(axis=0)
        skewness = np.where(variance > 0, (pseudo**3).mean(axis=0) / variance**1.5, 0.0)
        degrees_of_freedom = (number - 1) / (1 + SKEWNESS_COST * np.abs(skewness))
        quantile = stdtrit(degrees_of_freedom, (1 + confidence) / 2)
        unbiased = skewness * sqrt(number * (number - 1)) / max(number - 2, 1)
        upper = _without_skewness(quantile, unbiased, number)
        lower = _without_skewness(-quantile, unbiased, number)
        error = np.sqrt(variance / (number - 1))
        ends = invert(np.stack([center - error * upper, center - error * lower]))
    return np.where(np.isfinite(center) & np.isfinite(error), ends, nan)


def _without_skewness(quantile: Float64, skewness: Float64, number: int) -> Float64:
    """Return the value of the studentized statistic at which Hall's transformed statistic has a quantile.

    The transformed statistic is g(u) = sqrt(n) (u + c u^2 + c^2 u^3 / 3 + skewness / (6 n)) with c = skewness / 3 and
    the studentized statistic u sqrt(n); g is monotone, and its inverse is a cube root.
    """
    is_symmetric = np.abs(skewness) < SYMMETRIC
    shifted = quantile / sqrt(number) - skewness / (6 * number)
    third = np.where(is_symmetric, 1.0, skewness / 3)
    corrected = (np.cbrt(1 + 3 * third * shifted) - 1) / third
    return np.where(is_symmetric, shifted, corrected) * sqrt(number)
