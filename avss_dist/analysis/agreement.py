"""Agreement of layer scores: rank correlations and the overlap of their lowest layers.

A few pairs are compared one by one. Of many scores, the ranks are a matrix and the correlations of all pairs a product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from math import comb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.registry import LOWEST_SHARE
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import (
    MIN_VALUES,
    align,
    average_ranks,
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
        x, y, columns["interpolated"][chunk] = _aligned(scores, a[chunk], b[chunk])
        n = x.shape[1]
        size = min(count_lowest(n, share), n)
        order_x, order_y = (np.argsort(values, axis=1, kind="stable") for values in (x, y))  # ties: the earlier layer
        shared = ((np.argsort(order_x) < size) & (np.argsort(order_y) < size)).sum(axis=1)
        columns["layers"][chunk], columns["k"][chunk], columns["shared"][chunk] = n, size, shared
        columns["spearman"][chunk], columns["given_depth"][chunk] = _correlations(x, y)
        columns["jaccard"][chunk] = shared / (2 * size - shared)
        columns["jaccard_by_chance"][chunk], at_least = _expected_overlap(n, size)
        columns["p_by_chance"][chunk] = at_least[shared]
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
        rho[chunk], partial[chunk] = _correlations(x, y)
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


def _aligned(scores: Sequence[Scores], a: Indices, b: Indices) -> tuple[Float64, Float64, NDArray[np.bool_]]:
    """Return the values of pairs at common depths, float64[pairs, layers] each, and bool[pairs] of interpolation."""
    x, y, interpolated = zip(*(align(scores[i], scores[j]) for i, j in zip(a, b, strict=True)), strict=True)
    return np.array(x), np.array(y), np.array(interpolated)


def _correlations(x: Float64, y: Float64) -> tuple[Float64, Float64]:
    """Return Spearman's rho of every row of two scores, and its partial correlation given depth."""
    rho, depth = spearman_rows(x, y), np.broadcast_to(np.arange(x.shape[1], dtype=np.float64), x.shape)
    of_x, of_y = spearman_rows(x, depth), spearman_rows(y, depth)
    for row in np.flatnonzero(~np.isfinite(x + y).all(axis=1)):
        both = np.isfinite(x[row]) & np.isfinite(y[row])
        of_x[row], of_y[row] = (spearman(values[row][both], depth[row][both]) for values in (x, y))
    return rho, given_depth(rho, of_x, of_y)


@cache
def _expected_overlap(layers: int, size: int) -> tuple[float, Float64]:
    """Return the expected Jaccard index of two random sets of ``size`` layers and P(overlap >= n), n = 0...``size``."""
    overlaps = np.arange(size + 1)
    ways = [comb(size, int(overlap)) * comb(layers - size, size - int(overlap)) for overlap in overlaps]
    chance = np.array([number / comb(layers, size) for number in ways])
    return float((chance * overlaps / (2 * size - overlaps)).sum()), chance[::-1].cumsum()[::-1]


class RankMatrix:
    """Ranks of the layers of many scores, from which the correlations of any block of pairs are computed.

    The correlations equal those of `rank_correlations`, to which scores with missing or infinite values are left.
    Scores of different depth are compared at the relative depths of the one with fewer layers.

    Args:
        scores: depth and values of the layers, float64[layers] each, ascending in depth.
    """

    def __init__(self, scores: Sequence[Scores]) -> None:
        self._scores = scores
        grids: dict[int, Counter[Hashable]] = {}
        for depth, values in scores:
            grids.setdefault(len(values), Counter())[depth.tobytes()] += 1
        usual = {size: counts.most_common(1)[0][0] for size, counts in grids.items()}
        sizes = [
            len(values) if usual[len(values)] == depth.tobytes() and np.isfinite(values).all() else 0
            for depth, values in scores
        ]
        self._sizes = np.array(sizes, np.int64)  # 0 for scores that only `rank_correlations` compares

    def correlations(self, rows: Indices, columns: Indices) -> tuple[Float64, Float64]:
        """Return Spearman's rho and its partial correlation given depth, float64[rows, columns] each.

        They are NaN for fewer than three layers, and for constant scores.

        Args:
            rows, columns: int64[...], indices of scores.
        """
        rho, partial = (np.full((len(rows), len(columns)), np.nan) for _ in range(2))
        for sizes in product(*(np.unique(self._sizes[indices]).tolist() for indices in (rows, columns))):
            of_rows, of_columns = (
                np.flatnonzero(self._sizes[indices] == size)
                for indices, size in zip((rows, columns), sizes, strict=True)
            )
            block = np.ix_(of_rows, of_columns)
            rho[block], partial[block] = self._block(rows[of_rows], columns[of_columns], min(sizes))
        return rho, partial

    def _block(self, rows: Indices, columns: Indices, size: int) -> tuple[Float64, Float64]:
        """Return the correlations of scores that are all compared at the same ``size`` depths, or pair by pair if 0."""
        if not size:
            a, b = (index.ravel() for index in np.meshgrid(rows, columns, indexing="ij"))
            rho, partial = rank_correlations(self._scores, np.minimum(a, b), np.maximum(a, b))
            shape = len(rows), len(columns)
            return rho.reshape(shape), partial.reshape(shape)
        place, ranks, with_depth = self._ranked[size]
        x, y = ranks[place[rows]], ranks[place[columns]]
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = (x @ y.T) / np.sqrt(np.outer((x**2).sum(axis=1), (y**2).sum(axis=1)))
        if size < MIN_VALUES:
            rho[:] = np.nan
        return rho, given_depth(rho, with_depth[place[rows]][:, None], with_depth[place[columns]][None, :])

    @cached_property
    def _ranked(self) -> dict[int, tuple[Indices, Float64, Float64]]:
        """Rows of each score, ranks and correlations with depth, by the number of depths.

        The ranks are centered and doubled: doubled average ranks are integers, so that every sum over them is exact.
        """
        ranked = {}
        for size in np.unique(self._sizes[self._sizes > 0]).tolist():
            members = np.flatnonzero(self._sizes >= size)
            depth = self._scores[int(np.flatnonzero(self._sizes == size)[0])][0]
            scores = [self._scores[index] for index in members.tolist()]
            aligned = [values if len(values) == size else np.interp(depth, at, values) for at, values in scores]
            ranks = 2 * average_ranks(np.array(aligned)) - (size + 1)
            order = 2 * np.arange(size) - (size - 1.0)
            with np.errstate(invalid="ignore", divide="ignore"):
                with_depth = ranks @ order / np.sqrt((ranks**2).sum(axis=1) * (order**2).sum())
            place = np.full(len(self._scores), -1, np.int64)
            place[members] = np.arange(len(members))
            ranked[size] = place, ranks, with_depth
        return ranked
