"""Shares of a layer's variance that its single units carry."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from avss_dist.stats.layer_stats import Float64


def shares_of_means(sums: Float64, counts: Float64) -> Float64:
    """Return each unit's share of the variance over unit means, float64[layers, units].

    Args:
        sums: sum of each unit over tokens, float64[layers, units].
        counts: number of tokens, float64[layers, 1].

    Returns:
        Shares that add up to 1 in every layer; NaN if its variance is 0.
    """
    means = sums / counts
    return _shares((means - means.mean(axis=1, keepdims=True)) ** 2)


def shares_of_elements(sums: Float64, squares: Float64, counts: Float64) -> Float64:
    """Return each unit's share of the variance over elements, float64[layers, units].

    Args:
        sums: sum of each unit over tokens, float64[layers, units].
        squares: sum of squares of each unit over tokens, float64[layers, units].
        counts: number of tokens, float64[layers, 1].

    Returns:
        Shares that add up to 1 in every layer; NaN if its variance is 0.
    """
    mean = sums.sum(axis=1, keepdims=True) / (counts * sums.shape[1])
    return _shares(np.maximum(squares - 2 * mean * sums + counts * mean**2, 0))


def largest_share(shares: Float64) -> tuple[Float64, NDArray[np.int64]]:
    """Return the largest share of each layer, NaN if its shares are undefined, and the unit that carries it."""
    return shares.max(axis=1), shares.argmax(axis=1)


def _shares(values: Float64) -> Float64:
    total = values.sum(axis=1, keepdims=True)
    return np.divide(values, total, out=np.full(values.shape, np.nan), where=total > 0)
