"""Agreement of layer scores: rank correlations, the overlap of their lowest layers, groups of models, and a map.

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
import pyarrow as pa
from numpy.typing import NDArray

from avss_dist.core.registry import LOWEST_SHARE
from avss_dist.core.streams import tracked
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import (
    MIN_VALUES,
    align,
    average_ranks,
    count_lowest,
    given_depth,
    spearman_rows,
)

Scores = tuple[Float64, Float64]  # depth and values of layers, float64[layers] each, ascending in depth
Indices = NDArray[np.int64]
COLUMNS = {
    "layers": np.int64,
    "interpolated": np.bool_,
    "spearman": np.float64,
    "given_depth": np.float64,
    "k": np.int64,
    "shared": np.int64,
    "jaccard": np.float64,
    "jaccard_by_chance": np.float64,
    "p_by_chance": np.float64,
}
"""Columns of a pair of scores, each with its type."""
AT_ONCE = 1024  # pairs
BLOCK_ROWS = 512  # rows of a block of pairs: with 20,000 runs, a block is 80 MB
MAX_GROUPS = 50  # with more, the table of all pairs of groups tells nobody anything
RESOLUTION = 1e-5  # of the median of many correlations
MAX_SCORES = 5_000  # of a map: clustering takes memory and time with the square of their number
CELLS = 120  # along an axis of a map

GROUPS = pa.schema(
    [
        *((name, pa.string()) for name in ("by", "a", "b")),
        ("pairs", pa.int64()),
        *((name, pa.float64()) for name in ("spearman", "given_depth")),
    ]
)
"""Columns of a pair of groups: the mean correlation of their pairs.

``a`` equals ``b`` for the agreement within a group.
"""


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
    columns: dict[str, NDArray[Any]] = {name: np.empty(len(a), kind) for name, kind in COLUMNS.items()}
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
    return columns


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
    depth = np.where(np.isfinite(x) & np.isfinite(y), np.arange(x.shape[1], dtype=np.float64), np.nan)
    rho = spearman_rows(x, y)
    return rho, given_depth(rho, spearman_rows(x, depth), spearman_rows(y, depth))


@cache
def _expected_overlap(layers: int, size: int) -> tuple[float, Float64]:
    """Return the expected Jaccard index of two random sets of ``size`` layers and P(overlap >= n), n = 0...``size``."""
    overlaps = np.arange(size + 1)
    ways = [comb(size, int(overlap)) * comb(layers - size, size - int(overlap)) for overlap in overlaps]
    chance = np.array([number / comb(layers, size) for number in ways])
    return float((chance * overlaps / (2 * size - overlaps)).sum()), chance[::-1].cumsum()[::-1]


class RankMatrix:
    """Ranks of the layers of many scores, from which the correlations of any block of pairs are computed.

    The correlations equal those of `correlate_pairs`. Scores with missing or infinite values are compared as there.
    Scores of different depth are compared at the relative depths of the one with fewer layers.

    Args:
        scores: depth and values of the layers, float64[layers] each, ascending in depth.
    """

    def __init__(self, scores: Sequence[Scores]) -> None:
        self._scores = scores
        grids = Counter((len(values), depth.tobytes()) for depth, values in scores)
        usual = {size: grid for (size, grid), _ in reversed(grids.most_common())}  # the most common is the last
        sizes = [
            len(values) if usual[len(values)] == depth.tobytes() and np.isfinite(values).all() else 0
            for depth, values in scores
        ]
        self._sizes = np.array(sizes, np.int64)  # 0 for scores that are compared pair by pair

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
            rho, partial = np.empty((2, len(rows), len(columns)))
            a, b = (index.ravel() for index in np.meshgrid(rows, columns, indexing="ij"))
            for chunk in _chunks(self._scores, a, b):
                x, y, _ = _aligned(self._scores, *np.sort([a[chunk], b[chunk]], axis=0))
                rho.flat[chunk], partial.flat[chunk] = _correlations(x, y)
            return rho, partial
        members, ranks, with_depth = self._ranked[size]
        a, b = (np.searchsorted(members, indices) for indices in (rows, columns))
        x, y = ranks[a], ranks[b]
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = (x @ y.T) / np.sqrt(np.outer((x**2).sum(axis=1), (y**2).sum(axis=1)))
        if size < MIN_VALUES:
            rho[:] = np.nan
        return rho, given_depth(rho, with_depth[a][:, None], with_depth[b][None, :])

    @cached_property
    def _ranked(self) -> dict[int, tuple[Indices, Float64, Float64]]:
        """Indices of scores, their ranks, and their correlations with depth, by the number of depths.

        The ranks are centered and doubled: doubled average ranks are integers, so that every sum over them is exact.
        """
        ranked = {}
        for size in np.unique(self._sizes[self._sizes > 0]).tolist():
            members = np.flatnonzero(self._sizes >= size)
            depth = self._scores[int(np.flatnonzero(self._sizes == size)[0])][0]
            scores = (self._scores[index] for index in members.tolist())
            aligned = [values if len(values) == size else np.interp(depth, at, values) for at, values in scores]
            ranks = 2 * average_ranks(np.array(aligned)) - (size + 1)
            ranked[size] = members, ranks, spearman_rows(ranks, np.broadcast_to(np.arange(float(size)), ranks.shape))
        return ranked


def survey_pairs(
    matrix: RankMatrix, members: Mapping[str, Sequence[Hashable]], *, by: str, across_models: bool, most: int
) -> tuple[dict[str, Any], Indices]:
    """Correlate all pairs of equal strata and different values, and the pairs within and between groups.

    Memory is bounded, so that medians are rounded to `RESOLUTION`.

    Args:
        matrix: the scores.
        members: ``stratum``, ``value``, ``model`` and ``group`` of each score, in the order of ``matrix``.
        by: name of the groups' property.
        across_models: groups are compared over pairs of different models. Otherwise, over pairs of one model in
            different groups.
        most: number of the most, and of the least, similar pairs to return.

    Returns:
        The fields ``number``, ``spearman``, ``given_depth`` and ``groups`` of a `comparison.RankingComparison`, and
        int64[2, ...], the pairs that are most and least alike, ascending in each pair.
    """
    stratum, value, model, group = (_codes(members[name]) for name in ("stratum", "value", "model", "group"))
    groups = list(dict.fromkeys(members["group"]))
    has_groups, membership = 1 < len(groups) <= MAX_GROUPS, np.eye(len(groups))[group]
    sums, counts = (np.zeros((2, len(groups), len(groups))) for _ in range(2))
    number, histograms = 0, np.zeros((2, round(2 / RESOLUTION) + 1), np.int64)
    extremes = {sign: [np.empty((3, 0))] for sign in (1, -1)}  # correlation and both indices of pairs, block by block
    for rows, columns in tracked(list(_blocks(stratum)), "Comparing runs"):
        correlations = matrix.correlations(rows, columns)
        differ = (value[rows][:, None] != value[columns]) & (rows[:, None] < columns)
        number += int(differ.sum())
        for histogram, rho in zip(histograms, correlations, strict=True):
            defined = rho[differ & np.isfinite(rho)]
            histogram += np.bincount(np.rint((defined + 1) / RESOLUTION).astype(np.int64), minlength=len(histogram))
        flat, rho = np.flatnonzero(differ & np.isfinite(correlations[0])), correlations[0].ravel()
        for sign, blocks in extremes.items():
            chosen = flat[_largest(sign * rho[flat], most)]
            blocks.append(np.stack([rho[chosen], rows[chosen // len(columns)], columns[chosen % len(columns)]]))
        if has_groups:  # each pair is met twice, once from each side
            same_model = model[rows][:, None] == model[columns]
            chosen = ~same_model if across_models else same_model & (rows[:, None] != columns)
            for statistic, rho in enumerate(correlations):
                defined = chosen & np.isfinite(rho)
                sums[statistic] += membership[rows].T @ np.where(defined, rho, 0.0) @ membership[columns]
                counts[statistic] += membership[rows].T @ defined @ membership[columns]
    with np.errstate(invalid="ignore"):
        means = sums / counts
    of_groups: list[dict[str, Any]] = [
        {
            "by": by,
            "a": groups[a],
            "b": groups[b],
            "pairs": round(counts[0, a, b] / (2 if a == b else 1)),
            "spearman": means[0, a, b],
            "given_depth": means[1, a, b] if counts[1, a, b] else None,
        }
        for a, b in zip(*np.triu_indices(len(groups)), strict=True)
        if counts[0, a, b]
    ]
    spearman, given_depth = map(_summarize_histogram, histograms)
    tables = {sign: np.hstack(blocks) for sign, blocks in extremes.items()}
    ends = [table[1:, _largest(sign * table[0], most)] for sign, table in tables.items()]
    survey = {
        "number": number,
        "spearman": spearman,
        "given_depth": given_depth,
        "groups": pa.Table.from_pylist(of_groups, GROUPS),
    }
    return survey, np.unique(np.hstack(ends).astype(np.int64), axis=1)


def _summarize_histogram(counts: Indices) -> CorrelationSummary:
    """Summarize correlations by their numbers in bins of `RESOLUTION` from -1 on."""
    count = int(counts.sum())
    ordered = [1, (count + 1) // 2, count // 2 + 1, count] if count else []
    places = summarize(np.searchsorted(counts.cumsum(), ordered).astype(np.float64))
    median, lowest, highest = (bin_ * RESOLUTION - 1 for bin_ in (places.median, places.lowest, places.highest))
    return CorrelationSummary(count=count, median=median, lowest=lowest, highest=highest)


def _codes(values: Sequence[Hashable]) -> Indices:
    """Return an integer for each value, equal for equal values, by first appearance."""
    codes: dict[Hashable, int] = {}
    return np.array([codes.setdefault(value, len(codes)) for value in values], np.int64)


def _blocks(strata: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield rows and columns of scores of one stratum that are compared at once."""
    for stratum in np.unique(strata):
        columns = np.flatnonzero(strata == stratum)
        for start in range(0, len(columns) if len(columns) > 1 else 0, BLOCK_ROWS):
            yield columns[start : start + BLOCK_ROWS], columns


def _largest(values: Float64, most: int) -> Indices:
    """Return the indices of the largest values, the earlier of equal ones first."""
    bound = np.partition(values, len(values) - most)[len(values) - most] if len(values) > most else -np.inf
    candidates = np.flatnonzero(values >= bound)
    return candidates[np.argsort(-values[candidates], kind="stable")][:most]


@dataclass(frozen=True, kw_only=True, eq=False)
class SimilarityMap:
    """Rank correlations of many scores, ordered by hierarchical clustering.

    Neighbours share a cell if there are many scores.

    Attributes:
        rho: float64[cells, cells], Spearman's rho, the mean over all pairs of two cells; NaN where none is defined.
        labels: the scores of each cell, in words.
        groups: the most frequent group of each cell.
        scores: number of scores that are shown.
        left_out: number of scores that are not shown, because there are too many.
        mismatched: number of scores that are not shown, because they were measured under other conditions.
    """

    rho: Float64
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    scores: int
    left_out: int = 0
    mismatched: int = 0


def similarity_map(matrix: RankMatrix, labels: Sequence[str], groups: Sequence[str]) -> SimilarityMap:
    """Order scores by average-linkage clustering of one minus their rank correlation.

    Args:
        matrix: the scores.
        labels, groups: name and group of each score, in the order of ``matrix``. The last `MAX_SCORES` are shown.
    """
    shown = np.arange(len(labels))[-MAX_SCORES:]
    rho = np.concatenate(
        [matrix.correlations(shown[start : start + BLOCK_ROWS], shown)[0] for start in range(0, len(shown), BLOCK_ROWS)]
    )
    order = _order(rho)
    rho, shown = rho[np.ix_(order, order)], shown[order]
    cell = np.arange(len(shown)) * min(CELLS, len(shown)) // len(shown)
    members = [shown[cell == index].tolist() for index in range(cell[-1] + 1)]
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    total, count = (
        np.add.reduceat(np.add.reduceat(values, starts, axis=0), starts, axis=1)
        for values in (np.nan_to_num(rho), np.isfinite(rho).astype(float))
    )
    return SimilarityMap(
        rho=np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0),
        labels=tuple(labels[i] + (f" and {len(rest)} more" if rest else "") for i, *rest in members),
        groups=tuple(Counter(groups[index] for index in indices).most_common(1)[0][0] for indices in members),
        scores=len(shown),
        left_out=len(labels) - len(shown),
    )


def _order(rho: Float64) -> NDArray[np.int64]:
    """Return the order of the leaves of a clustering. Scores without a correlation are like none."""
    from scipy.cluster.hierarchy import leaves_list, linkage  # a second to import
    from scipy.spatial.distance import squareform

    if len(rho) < 3:
        return np.arange(len(rho))
    distance = 1 - np.nan_to_num(rho, nan=0.0)
    distance = (distance + distance.T) / 2
    np.fill_diagonal(distance, 0)
    return np.asarray(leaves_list(linkage(squareform(distance, checks=False), "average")), np.int64)
