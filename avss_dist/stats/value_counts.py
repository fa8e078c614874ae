"""Cumulative distribution of the inputs of a linear map at fixed edges. Pure numpy."""

from __future__ import annotations

import numpy as np

from avss_dist.stats.layer_stats import Float64

_SIZES = 2.0 ** (np.arange(-20 * 8, 14 * 8 + 1) / 8)  # 8 an octave
EDGES = np.concatenate([-_SIZES[::-1], _SIZES, [np.inf]])
"""Edges of the distribution, float64[edges], ascending. Counts are cumulative: the number of values up to each edge."""


def share_within(counts: Float64, size: float, center: float = 0.0) -> float:
    """Return the share of values within ``size`` of ``center``, interpolated linearly between edges."""
    low, high = np.interp([center - size, center + size], EDGES[:-1], counts[:-1])
    return float((high - low) / counts[-1])


def size_of_share(counts: Float64, share: float, center: float = 0.0) -> float:
    """Return the size at which `share_within` equals ``share``, by bisection."""
    low, high = 0.0, float(_SIZES[-1]) if share > 0 else 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if share_within(counts, middle, center) < share else (low, middle)
    return high


def mode_of(counts: Float64) -> float:
    """Return the mode: the middle of the narrowest interval between edges that holds a tenth of all values.

    This is one step of the half-sample mode (Bickel and Frühwirth, Computational Statistics & Data Analysis 50, 2006).
    """
    shares, edges = counts[:-1] / counts[-1], EDGES[:-1]
    ends = np.interp(shares + 0.1, shares, edges, right=np.inf)
    at = int(np.argmin(ends - edges))
    return float((edges[at] + ends[at]) / 2)
