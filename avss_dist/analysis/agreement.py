"""Agreement of pairs of layer scores: rank correlations and the overlap of their lowest layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.registry import LOWEST_SHARE
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import (
    align,
    count_lowest,
    given_depth,
    spearman,
    spearman_rows,
)
from avss_dist.system.streams import tracked

Scores = tuple[Float64, Float64]  # depth and values of layers, float64[layers] each, ascending in depth
Indices = NDArray[np.int64]
COLUMNS = (
    "layers",
    "interpolated",
    "spearman",
    "given_depth",
    "k",
    "shared",
    "jaccard",
    "jaccard_by_chance",
    "p_by_chance",
)
AT_ONCE = 1024  # pairs


def correlate_pairs(
    scores: Sequence[Scores], a: Indices, b: Indices, *, share: float = LOWEST_SHARE
) -> Mapping[str, NDArray[Any]]:
    """Return the agreement of each pair of scores.

    If the depths of a pair differ, the score with more layers is interpolated linearly at the depths of the other.

    Args:
        a, b: int64[pairs], the indices in ``scores`` of the two scores of each pair.
        share: number of lowest layers to compare, as a share of the layers.

    Returns:
        An array [pairs] for each of `COLUMNS`. ``spearman`` is Spearman's rho with average ranks over the layers at
        which both scores are finite. ``given_depth`` is its partial correlation given depth, NaN if one of the scores
        is the order of depth itself. Correlations are NaN for fewer than three layers or a constant score.
    """
    columns = {name: np.full(len(a), np.nan) for name in COLUMNS}
    for chunk in tracked(list(_chunks(scores, a, b)), f"Comparing {len(a):,} pairs"):
        for name, values in _agreement(scores, a[chunk], b[chunk], share).items():
            columns[name][chunk] = values
    kinds = {"layers": np.int64, "k": np.int64, "shared": np.int64, "interpolated": np.bool_}
    return {name: values.astype(kinds.get(name, np.float64)) for name, values in columns.items()}


def rank_correlations(scores: Sequence[Scores], a: Indices, b: Indices) -> tuple[Float64, Float64]:
    """Return Spearman's rho of pairs of scores and its partial correlation given depth, float64[pairs] each.

    These are the columns ``spearman`` and ``given_depth`` of `correlate_pairs`, at a fraction of its cost.

    Args:
        a, b: int64[pairs], the indices in ``scores`` of the two scores of each pair.
    """
    rho, partial = np.full(len(a), np.nan), np.full(len(a), np.nan)
    for chunk in _chunks(scores, a, b):
        x, y, _ = _aligned(scores, a[chunk], b[chunk])
        rho[chunk] = spearman_rows(x, y)
        partial[chunk] = _given_depth(rho[chunk], x, y)
    return rho, partial


@dataclass(frozen=True, kw_only=True)
class CorrelationSummary:
    """Summary of the defined correlations of many pairs.

    Attributes:
        count: number of pairs whose correlation is defined.
        median: median correlation, NaN if ``count`` is 0.
        lowest, highest: smallest and largest correlation, NaN if ``count`` is 0.
    """

    count: int
    median: float
    lowest: float
    highest: float


def summarize(correlations: Float64) -> CorrelationSummary:
    """Summarize correlations, float64[pairs]. NaN marks an undefined one."""
    defined = correlations[~np.isnan(correlations)]
    numbers = (np.median(defined), defined.min(), defined.max()) if defined.size else (np.nan,) * 3
    median, lowest, highest = map(float, numbers)
    return CorrelationSummary(count=defined.size, median=median, lowest=lowest, highest=highest)


def _chunks(scores: Sequence[Scores], a: Indices, b: Indices) -> Iterator[Indices]:
    """Yield the indices of at most `AT_ONCE` pairs that are compared at the same number of layers."""
    sizes = np.array([len(values) for _, values in scores])
    common = np.minimum(sizes[a], sizes[b])
    for size in np.unique(common):
        members = np.flatnonzero(common == size)
        yield from (members[start : start + AT_ONCE] for start in range(0, len(members), AT_ONCE))


def _agreement(scores: Sequence[Scores], a: Indices, b: Indices, share: float) -> Mapping[str, NDArray[Any]]:
    x, y, interpolated = _aligned(scores, a, b)
    n = x.shape[1]
    size = min(count_lowest(n, share), n)
    order_x, order_y = (np.argsort(values, axis=1, kind="stable") for values in (x, y))  # ties: the earlier layer
    shared = ((np.argsort(order_x) < size) & (np.argsort(order_y) < size)).sum(axis=1)
    by_chance, at_least = _expected_overlap(n, size)
    rho = spearman_rows(x, y)
    return {
        "layers": np.full(len(x), n),
        "interpolated": interpolated,
        "k": np.full(len(x), size),
        "shared": shared,
        "spearman": rho,
        "given_depth": _given_depth(rho, x, y),
        "jaccard": shared / (2 * size - shared),
        "jaccard_by_chance": np.full(len(x), by_chance),
        "p_by_chance": at_least[shared],
    }


def _aligned(scores: Sequence[Scores], a: Indices, b: Indices) -> tuple[Float64, Float64, NDArray[np.bool_]]:
    """Return the values of pairs at common depths, float64[pairs, layers] each, and bool[pairs] of interpolation."""
    x, y, interpolated = zip(*(align(scores[i], scores[j]) for i, j in zip(a, b, strict=True)), strict=True)
    return np.array(x), np.array(y), np.array(interpolated)


def _given_depth(rho: Float64, x: Float64, y: Float64) -> Float64:
    """Return the partial correlation of the ranks of two scores given depth, for every row."""
    depth = np.broadcast_to(np.arange(x.shape[1], dtype=np.float64), x.shape)
    of_x, of_y = spearman_rows(x, depth), spearman_rows(y, depth)
    for row in np.flatnonzero(~np.isfinite(x + y).all(axis=1)):
        both = np.isfinite(x[row]) & np.isfinite(y[row])
        of_x[row], of_y[row] = (spearman(values[row][both], depth[row][both]) for values in (x, y))
    return given_depth(rho, of_x, of_y)


@cache
def _expected_overlap(layers: int, size: int) -> tuple[float, Float64]:
    """Return the expected Jaccard index of two random sets of ``size`` layers and P(overlap >= n), n = 0...``size``."""
    overlaps = np.arange(size + 1)
    ways = [comb(size, int(overlap)) * comb(layers - size, size - int(overlap)) for overlap in overlaps]
    chance = np.array([number / comb(layers, size) for number in ways])
    return float((chance * overlaps / (2 * size - overlaps)).sum()), chance[::-1].cumsum()[::-1]
