"""Histograms and value counts of abs(x). Pure numpy."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Values = tuple[NDArray[np.float32], NDArray[np.int64]]  # abs(x), ascending, and how many elements have it

CUT_SHIFT = 16  # float32 pattern without its sign: its upper half stays, 8 exponent bits and 7 mantissa bits
CUTS = 1 << 15

HISTOGRAM_BINS = 2048
HISTOGRAM_SHIFT = 20  # float32 pattern without its sign: 8 exponent bits and the top 3 mantissa bits stay
HISTOGRAM_EDGES: NDArray[np.float64] = np.append(
    (np.arange(HISTOGRAM_BINS - 8, dtype=np.uint32) << HISTOGRAM_SHIFT).view(np.float32).astype(np.float64), np.inf
)
"""Edges of the bins of abs(x) that finite values can reach: bin b is ``[edges[b], edges[b + 1])``. Shape [2041]."""


def histogram_bin(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the histogram bin of each abs(x): the upper bits of its float32 pattern. Same shape as ``values``."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(HISTOGRAM_SHIFT)).astype(np.int64)


def bin_edges(value: float) -> tuple[float, float]:
    """Return the lower and upper edge of the histogram bin of a value."""
    low = min(int(np.searchsorted(HISTOGRAM_EDGES, value, side="right")), len(HISTOGRAM_EDGES) - 1) - 1
    return float(HISTOGRAM_EDGES[low]), float(HISTOGRAM_EDGES[low + 1])


def histogram_below(histogram: NDArray[np.int64], threshold: float, share: float | None = None) -> NDArray[np.float64]:
    """Return the number of elements below ``threshold`` in each histogram, float64[...].

    Args:
        histogram: int64[..., 2048].
        share: share below the threshold of the elements in its bin. By default, values are assumed to be uniform in
            that bin.
    """
    if not threshold > 0:
        return np.zeros(histogram.shape[:-1])
    position = int(np.searchsorted(HISTOGRAM_EDGES, threshold, side="right")) - 1
    whole = histogram[..., :position].sum(axis=-1).astype(np.float64)
    if position >= len(HISTOGRAM_EDGES) - 1:
        return whole
    low, high = HISTOGRAM_EDGES[position : position + 2]
    if share is None:
        share = (threshold - low) / (high - low)  # 0 in the last bin, which has no end
    return whole + share * histogram[..., position]


def values_of_cuts(counts: NDArray[np.int64]) -> Values:
    """Return the values and counts of truncated float32 patterns.

    Args:
        counts: int64[32768], by the upper half of the pattern of abs(x).
    """
    present = np.flatnonzero(counts)
    return (present.astype(np.uint32) << np.uint32(CUT_SHIFT)).view(np.float32), counts[present]


def next_cut(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the next larger truncated value after each. Elements truncated to a value are below it."""
    bits = values.view(np.uint32) + np.uint32(1 << CUT_SHIFT)
    return bits.view(np.float32).astype(np.float64)


def merge_values(a: Values, b: Values) -> Values:
    """Return the counts by value over both samples."""
    if not a[0].size or not b[0].size:
        return a if a[0].size else b
    values, counts = np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])
    order = np.argsort(values, kind="stable")  # which merges two runs
    values, counts = values[order], counts[order]
    first = np.flatnonzero(np.append(True, values[1:] != values[:-1]))
    return values[first], np.add.reduceat(counts, first)
