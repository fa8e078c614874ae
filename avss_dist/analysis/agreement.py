"""Agreement of layer scores: rank correlations, the overlap of their lowest layers, groups of models, and a map.

A few pairs are compared one by one. Of many scores, the ranks are a matrix and the correlations of all pairs a product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import combinations_with_replacement
from math import comb
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avss_dist.core.streams import tracked
from avss_dist.core.values import NewRow
from avss_dist.stats.catalog import LOWEST_SHARE
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
        ("by", pa.string()),
        ("a", pa.string()),
        ("b", pa.string()),
        ("pairs", pa.int64()),
        ("spearman", pa.float64()),
        ("given_depth", pa.float64()),
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
    columns: dict[str, NDArray[Any]] = {}
    for name, kind in COLUMNS.items():
        columns[name] = np.empty(len(a), kind)
    for chunk in tracked(list(_chunks(scores, a, b)), f"Comparing {len(a):,} pairs"):
        pairs = _aligned(scores, a[chunk], b[chunk])
        for name, values in _agreement(pairs, share).items():
            columns[name][chunk] = values
    return columns


def _agreement(pairs: _AlignedPairs, share: float) -> NewRow:
    """Return a value or an array [pairs] for each of `COLUMNS`, of pairs with the same number of layers."""
    num_layers = pairs.first.shape[1]
    num_lowest = min(count_lowest(num_layers, share), num_layers)
    is_lowest_in_both = _is_lowest(pairs.first, num_lowest) & _is_lowest(pairs.second, num_lowest)
    shared = is_lowest_in_both.sum(axis=1)
    rho, partial = _correlations(pairs)
    jaccard_by_chance, at_least = _expected_overlap(num_layers, num_lowest)
    return {
        "layers": num_layers,
        "interpolated": pairs.interpolated,
        "spearman": rho,
        "given_depth": partial,
        "k": num_lowest,
        "shared": shared,
        "jaccard": shared / (2 * num_lowest - shared),
        "jaccard_by_chance": jaccard_by_chance,
        "p_by_chance": at_least[shared],
    }


def _is_lowest(values: Float64, number: int) -> NDArray[np.bool_]:
    """Return whether a layer is among the lowest of its row, bool[rows, layers]. Of ties, the earlier layer is."""
    order = np.argsort(values, axis=1, kind="stable")
    places = np.argsort(order)
    return places < number


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
    if not defined.size:
        return CorrelationSummary(count=0, median=np.nan, lowest=np.nan, highest=np.nan)
    return CorrelationSummary(
        count=defined.size,
        median=float(np.median(defined)),
        lowest=float(defined.min()),
        highest=float(defined.max()),
    )


def _chunks(scores: Sequence[Scores], a: Indices, b: Indices) -> Iterator[Indices]:
    """Yield the indices of at most `AT_ONCE` pairs that are compared at the same number of layers."""
    sizes = np.array([len(values) for _, values in scores])
    common = np.minimum(sizes[a], sizes[b])
    for size in np.unique(common):
        members = np.flatnonzero(common == size)
        for start in range(0, len(members), AT_ONCE):
            yield members[start : start + AT_ONCE]


@dataclass(frozen=True, eq=False)
class _AlignedPairs:
    """Values of pairs of scores at common depths.

    Attributes:
        first, second: values of both scores of each pair, float64[pairs, layers].
        interpolated: bool[pairs], whether one of the two was interpolated.
    """

    first: Float64
    second: Float64
    interpolated: NDArray[np.bool_]


def _aligned(scores: Sequence[Scores], a: Indices, b: Indices) -> _AlignedPairs:
    """Return pairs of scores, which all have the same number of common depths."""
    first = []
    second = []
    interpolated = []
    for i, j in zip(a, b, strict=True):
        values, other_values, is_interpolated = align(scores[i], scores[j])
        first.append(values)
        second.append(other_values)
        interpolated.append(is_interpolated)
    return _AlignedPairs(np.array(first), np.array(second), np.array(interpolated))


def _correlations(pairs: _AlignedPairs) -> tuple[Float64, Float64]:
    """Return Spearman's rho of every pair, and its partial correlation given depth."""
    x = pairs.first
    y = pairs.second
    order = np.arange(x.shape[1], dtype=np.float64)
    depth = np.where(np.isfinite(x) & np.isfinite(y), order, np.nan)
    rho = spearman_rows(x, y)
    return rho, given_depth(rho, spearman_rows(x, depth), spearman_rows(y, depth))


@cache
def _expected_overlap(layers: int, size: int) -> tuple[float, Float64]:
    """Return the expected Jaccard index of two random sets of ``size`` layers and P(overlap >= n), n = 0...``size``."""
    overlaps = np.arange(size + 1)
    probabilities = np.empty(size + 1)
    for overlap in range(size + 1):
        ways = comb(size, overlap) * comb(layers - size, size - overlap)
        probabilities[overlap] = ways / comb(layers, size)
    expected_jaccard = float((probabilities * overlaps / (2 * size - overlaps)).sum())
    at_least = probabilities[::-1].cumsum()[::-1]
    return expected_jaccard, at_least


@dataclass(frozen=True, eq=False)
class _RankedScores:
    """Ranks of scores that can be compared at the same depths.

    Attributes:
        members: int64[members], ascending indices of the scores.
        ranks: float64[members, depths], centered and doubled: doubled average ranks are integers, so that every sum
            over them is exact.
        with_depth: float64[members], correlation of each score with depth.
    """

    members: Indices
    ranks: Float64
    with_depth: Float64


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
        usual_grids: dict[int, bytes] = {}
        for (size, grid), _ in grids.most_common():
            usual_grids.setdefault(size, grid)
        # Number of depths of each score, 0 for those that are compared pair by pair.
        self._sizes = np.zeros(len(scores), np.int64)
        for index, (depth, values) in enumerate(scores):
            if usual_grids[len(values)] == depth.tobytes() and np.isfinite(values).all():
                self._sizes[index] = len(values)

    def correlations(self, rows: Indices, columns: Indices) -> tuple[Float64, Float64]:
        """Return Spearman's rho and its partial correlation given depth, float64[rows, columns] each.

        They are NaN for fewer than three layers, and for constant scores.

        Args:
            rows, columns: int64[...], indices of scores.
        """
        rho = np.full((len(rows), len(columns)), np.nan)
        partial = np.full((len(rows), len(columns)), np.nan)
        sizes_of_rows = self._sizes[rows]
        sizes_of_columns = self._sizes[columns]
        for row_size in np.unique(sizes_of_rows).tolist():
            of_size = np.flatnonzero(sizes_of_rows == row_size)
            for column_size in np.unique(sizes_of_columns).tolist():
                of_column_size = np.flatnonzero(sizes_of_columns == column_size)
                block = np.ix_(of_size, of_column_size)
                common_size = min(row_size, column_size)
                if common_size:
                    result = self._at_common_depths(rows[of_size], columns[of_column_size], common_size)
                else:
                    result = self._pair_by_pair(rows[of_size], columns[of_column_size])
                rho[block], partial[block] = result
        return rho, partial

    def _pair_by_pair(self, rows: Indices, columns: Indices) -> tuple[Float64, Float64]:
        """Return the correlations of scores of which each pair is aligned on its own."""
        grid_of_rows, grid_of_columns = np.meshgrid(rows, columns, indexing="ij")
        a = grid_of_rows.ravel()
        b = grid_of_columns.ravel()
        rho = np.empty((len(rows), len(columns)))
        partial = np.empty((len(rows), len(columns)))
        for chunk in _chunks(self._scores, a, b):
            earlier = np.minimum(a[chunk], b[chunk])
            later = np.maximum(a[chunk], b[chunk])
            rho.flat[chunk], partial.flat[chunk] = _correlations(_aligned(self._scores, earlier, later))
        return rho, partial

    def _at_common_depths(self, rows: Indices, columns: Indices, size: int) -> tuple[Float64, Float64]:
        """Return the correlations of scores that are all compared at the same ``size`` depths."""
        ranked = self._ranked[size]
        a = np.searchsorted(ranked.members, rows)
        b = np.searchsorted(ranked.members, columns)
        ranks_a = ranked.ranks[a]
        ranks_b = ranked.ranks[b]
        squares = np.outer((ranks_a**2).sum(axis=1), (ranks_b**2).sum(axis=1))
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = (ranks_a @ ranks_b.T) / np.sqrt(squares)
        if size < MIN_VALUES:
            rho[:] = np.nan
        depth_a = ranked.with_depth[a][:, None]
        depth_b = ranked.with_depth[b][None, :]
        return rho, given_depth(rho, depth_a, depth_b)

    @cached_property
    def _ranked(self) -> dict[int, _RankedScores]:
        """Ranked scores by the number of depths at which they are compared."""
        sizes = np.unique(self._sizes[self._sizes > 0])
        return {size: self._rank(size) for size in sizes.tolist()}

    def _rank(self, size: int) -> _RankedScores:
        """Return the scores with at least ``size`` depths, at the depths of those that have as many."""
        members = np.flatnonzero(self._sizes >= size)
        first_of_size = int(np.flatnonzero(self._sizes == size)[0])
        depth, _ = self._scores[first_of_size]
        aligned = []
        for index in members.tolist():
            own_depth, values = self._scores[index]
            if len(values) != size:
                values = np.interp(depth, own_depth, values)
            aligned.append(values)
        ranks = 2 * average_ranks(np.array(aligned)) - (size + 1)
        order = np.broadcast_to(np.arange(float(size)), ranks.shape)
        return _RankedScores(members, ranks, spearman_rows(ranks, order))


@dataclass(frozen=True, kw_only=True)
class ScoreProperties:
    """Properties of a score by which pairs are chosen.

    Attributes:
        stratum: equal for both scores of a pair.
        value: different for both scores of a pair.
        model: name of the model.
        group: group of which the mean correlations are known.
    """

    stratum: Hashable
    value: Hashable
    model: str
    group: str


@dataclass(frozen=True, kw_only=True, eq=False)
class PairSurvey:
    """Summary of the correlations of many pairs.

    Attributes:
        number: number of pairs.
        spearman, given_depth: summaries of their correlations. Medians are rounded to `RESOLUTION`.
        groups: a table of `GROUPS`, empty without groups.
        extremes: int64[2, pairs], the pairs that are most and least alike, ascending in each pair.
    """

    number: int
    spearman: CorrelationSummary
    given_depth: CorrelationSummary
    groups: pa.Table
    extremes: Indices


def survey_pairs(
    matrix: RankMatrix, members: Sequence[ScoreProperties], *, by: str, across_models: bool, most: int
) -> PairSurvey:
    """Correlate all pairs of equal strata and different values, and the pairs within and between groups.

    Memory is bounded: no more than a block of all correlations exists at a time.

    Args:
        matrix: the scores.
        members: properties of each score, in the order of ``matrix``.
        by: name of the groups' property.
        across_models: groups are compared over pairs of different models. Otherwise, over pairs of one model in
            different groups.
        most: number of the most, and of the least, similar pairs to return.
    """
    stratum = _codes([member.stratum for member in members])
    value = _codes([member.value for member in members])
    model = _codes([member.model for member in members])
    groups = list(dict.fromkeys(member.group for member in members))
    means = None
    if 1 < len(groups) <= MAX_GROUPS:
        means = _GroupMeans(groups, _codes([member.group for member in members]))
    number = 0
    spearman = _Histogram()
    given_depth = _Histogram()
    most_alike = _Extremes(1, most)
    least_alike = _Extremes(-1, most)
    for rows, columns in tracked(list(_blocks(stratum)), "Comparing runs"):
        rho, partial = matrix.correlations(rows, columns)
        # Each pair is in two blocks, or twice in one: it counts where its first score is the row.
        is_pair = (value[rows][:, None] != value[columns]) & (rows[:, None] < columns)
        number += int(is_pair.sum())
        spearman.add(rho[is_pair])
        given_depth.add(partial[is_pair])
        defined = np.flatnonzero(is_pair & np.isfinite(rho))
        most_alike.add(rho, defined, rows, columns)
        least_alike.add(rho, defined, rows, columns)
        if means:
            is_counted = model[rows][:, None] != model[columns]
            if not across_models:
                is_counted = ~is_counted & (rows[:, None] != columns)
            means.add(rho, partial, is_counted, rows, columns)
    extremes = np.hstack([most_alike.pairs(), least_alike.pairs()])
    return PairSurvey(
        number=number,
        spearman=spearman.summarize(),
        given_depth=given_depth.summarize(),
        groups=means.table(by) if means else GROUPS.empty_table(),
        extremes=np.unique(extremes, axis=1),
    )


class _Histogram:
    """Numbers of correlations in bins of `RESOLUTION` from -1 on."""

    def __init__(self) -> None:
        self._counts = np.zeros(round(2 / RESOLUTION) + 1, np.int64)

    def add(self, correlations: Float64) -> None:
        """Count correlations, float64[pairs]. Those that are not defined are left out."""
        defined = correlations[np.isfinite(correlations)]
        bins = np.rint((defined + 1) / RESOLUTION).astype(np.int64)
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def summarize(self) -> CorrelationSummary:
        """Summarize the correlations by the bins of the lowest, of those in the middle, and of the highest."""
        count = int(self._counts.sum())
        # The lowest, the one or two in the middle, and the highest, counted from 1.
        places = [1, (count + 1) // 2, count // 2 + 1, count] if count else []
        bin_of_place = np.searchsorted(self._counts.cumsum(), places)
        bins = summarize(bin_of_place.astype(np.float64))
        return CorrelationSummary(
            count=count,
            median=bins.median * RESOLUTION - 1,
            lowest=bins.lowest * RESOLUTION - 1,
            highest=bins.highest * RESOLUTION - 1,
        )


class _Extremes:
    """The pairs with the largest correlations, or with the smallest.

    Args:
        sign: 1 for the largest, -1 for the smallest.
        most: their number.
    """

    def __init__(self, sign: int, most: int) -> None:
        self._sign = sign
        self._most = most
        self._blocks = [np.empty((3, 0))]  # correlation and both scores of pairs

    def add(self, rho: Float64, defined: Indices, rows: Indices, columns: Indices) -> None:
        """Add the pairs of a block.

        Args:
            rho: float64[rows, columns], correlations.
            defined: int64[pairs], flat indices in ``rho`` of the pairs that have one.
            rows, columns: scores of the block.
        """
        flat_rho = rho.ravel()
        chosen = defined[_largest(self._sign * flat_rho[defined], self._most)]
        first = rows[chosen // len(columns)]
        second = columns[chosen % len(columns)]
        self._blocks.append(np.stack([flat_rho[chosen], first, second]))

    def pairs(self) -> Indices:
        """Return the scores of the most extreme pairs, int64[2, pairs]."""
        candidates = np.hstack(self._blocks)
        chosen = _largest(self._sign * candidates[0], self._most)
        return candidates[1:, chosen].astype(np.int64)


class _GroupMeans:
    """Mean correlations within and between groups.

    Args:
        groups: names of the groups.
        group_of_score: int64[scores], index of the group of each score.
    """

    def __init__(self, groups: Sequence[str], group_of_score: Indices) -> None:
        self._groups = groups
        self._membership = np.eye(len(groups))[group_of_score]
        self._spearman = _BlockMeans(len(groups))
        self._given_depth = _BlockMeans(len(groups))

    def add(
        self, rho: Float64, partial: Float64, is_counted: NDArray[np.bool_], rows: Indices, columns: Indices
    ) -> None:
        """Add the correlations of a block, float64[rows, columns], where they are counted."""
        of_rows = self._membership[rows]
        of_columns = self._membership[columns]
        self._spearman.add(rho, is_counted, of_rows, of_columns)
        self._given_depth.add(partial, is_counted, of_rows, of_columns)

    def table(self, by: str) -> pa.Table:
        """Return a table of `GROUPS` with the pairs of groups that have a correlation.

        Args:
            by: name of the groups' property.
        """
        spearman = self._spearman.means()
        given_depth = self._given_depth.means()
        rows = []
        for a, b in combinations_with_replacement(range(len(self._groups)), 2):
            # Each pair within a group was added twice, once from each side.
            pairs = self._spearman.counts[a, b] / (2 if a == b else 1)
            if pairs:
                row = {"by": by, "a": self._groups[a], "b": self._groups[b], "pairs": round(pairs)}
                row["spearman"] = spearman[a, b]
                row["given_depth"] = given_depth[a, b] if self._given_depth.counts[a, b] else None
                rows.append(row)
        return pa.Table.from_pylist(rows, GROUPS)


class _BlockMeans:
    """Mean correlations of the scores of each two groups.

    Attributes:
        counts: float64[groups, groups], number of the correlations.
    """

    def __init__(self, number: int) -> None:
        self._sums = np.zeros((number, number))
        self.counts = np.zeros((number, number))

    def add(self, rho: Float64, is_counted: NDArray[np.bool_], of_rows: Float64, of_columns: Float64) -> None:
        """Add defined correlations, float64[rows, columns], where they are counted.

        Args:
            of_rows, of_columns: 1 in the group of each row and column, else 0, float64[..., groups].
        """
        defined = is_counted & np.isfinite(rho)
        self._sums += of_rows.T @ np.where(defined, rho, 0.0) @ of_columns
        self.counts += of_rows.T @ defined @ of_columns

    def means(self) -> Float64:
        """Return the means, float64[groups, groups], NaN without a correlation."""
        with np.errstate(invalid="ignore"):
            return self._sums / self.counts


def _codes(values: Sequence[Hashable]) -> Indices:
    """Return an integer for each value, equal for equal values, by first appearance."""
    codes: dict[Hashable, int] = {}
    return np.array([codes.setdefault(value, len(codes)) for value in values], np.int64)


def _blocks(strata: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield rows and columns of scores of one stratum that are compared at once."""
    for stratum in np.unique(strata):
        columns = np.flatnonzero(strata == stratum)
        if len(columns) < 2:
            continue
        for start in range(0, len(columns), BLOCK_ROWS):
            yield columns[start : start + BLOCK_ROWS], columns


def _largest(values: Float64, most: int) -> Indices:
    """Return the indices of the largest values, the earlier of equal ones first."""
    smallest = -np.inf
    if len(values) > most:
        place = len(values) - most
        smallest = np.partition(values, place)[place]
    candidates = np.flatnonzero(values >= smallest)
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
    blocks = []
    for start in range(0, len(shown), BLOCK_ROWS):
        block, _ = matrix.correlations(shown[start : start + BLOCK_ROWS], shown)
        blocks.append(block)
    rho = np.concatenate(blocks)
    order = _order(rho)
    rho = rho[np.ix_(order, order)]
    shown = shown[order]
    cell = np.arange(len(shown)) * min(CELLS, len(shown)) // len(shown)
    starts = np.flatnonzero(np.diff(cell, prepend=-1))
    total = _block_sums(np.nan_to_num(rho), starts)
    count = _block_sums(np.isfinite(rho).astype(float), starts)
    mean = np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)
    cell_labels = []
    cell_groups = []
    for members in np.split(shown, starts[1:]):
        cell_labels.append(_cell_label([labels[score] for score in members]))
        cell_groups.append(_most_frequent([groups[score] for score in members]))
    return SimilarityMap(
        rho=mean,
        labels=tuple(cell_labels),
        groups=tuple(cell_groups),
        scores=len(shown),
        left_out=len(labels) - len(shown),
    )


def _block_sums(values: Float64, starts: Indices) -> Float64:
    """Return the sums of a matrix over the blocks that begin at some rows, and at the columns of the same numbers."""
    sums: Float64 = np.add.reduceat(np.add.reduceat(values, starts, axis=0), starts, axis=1)
    return sums


def _cell_label(labels: Sequence[str]) -> str:
    """Return the label of a cell, given those of its scores."""
    if len(labels) == 1:
        return labels[0]
    return f"{labels[0]} and {len(labels) - 1} more"


def _most_frequent(groups: Sequence[str]) -> str:
    """Return the most frequent of the groups, the first one of several."""
    ((group, _),) = Counter(groups).most_common(1)
    return group


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
