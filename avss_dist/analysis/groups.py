"""Many layer rankings at once: the agreement of groups of models from all of their pairs, and a map of all rankings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avss_dist.analysis.agreement import CorrelationSummary, Indices, RankMatrix
from avss_dist.stats.layer_stats import Float64
from avss_dist.system.streams import tracked

AT_ONCE = 512  # rows of a block of pairs: with 20,000 runs, a block is 80 MB
MAX_GROUPS = 50  # with more, the table of all pairs of groups tells nobody anything
RESOLUTION = 1e-5  # of the median of many correlations
MAX_SCORES = 5_000  # of a map: clustering takes memory and time with the square of their number
CELLS = 120  # along an axis of a map

SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("by", "a", "b")),
        ("pairs", pa.int64()),
        *((name, pa.float64()) for name in ("spearman", "given_depth")),
    ]
)
"""Columns of a pair of groups: the mean correlation of their pairs.

``a`` equals ``b`` for the agreement within a group.
"""


@dataclass(frozen=True, kw_only=True)
class PairSurvey:
    """Correlations of all pairs of a comparison, summarized in bounded memory.

    Attributes:
        number: number of pairs that differ in their value.
        spearman, given_depth: summaries of their correlations, to `RESOLUTION`.
        groups: rows of `SCHEMA`; empty without groups.
        extremes: int64[2, ...], the pairs that are most and least alike, ascending in each pair.
    """

    number: int
    spearman: CorrelationSummary
    given_depth: CorrelationSummary
    groups: pa.Table = field(default_factory=SCHEMA.empty_table)
    extremes: Indices


def survey_pairs(
    matrix: RankMatrix, members: Mapping[str, Sequence[Hashable]], *, by: str, across_models: bool, most: int
) -> PairSurvey:
    """Correlate all pairs of equal strata and different values, and the pairs within and between groups.

    Args:
        matrix: the scores.
        members: ``stratum``, ``value``, ``model`` and ``group`` of each score, in the order of ``matrix``.
        by: name of the groups' property.
        across_models: groups are compared over pairs of different models. Otherwise, over pairs of one model in
            different groups.
        most: number of the most, and of the least, similar pairs to return.
    """
    stratum, value, model, group = (_codes(members[name]) for name in ("stratum", "value", "model", "group"))
    groups = list(dict.fromkeys(members["group"]))
    has_groups, membership = 1 < len(groups) <= MAX_GROUPS, np.eye(len(groups))[group]
    sums, counts = (np.zeros((2, len(groups), len(groups))) for _ in range(2))
    number, histograms = 0, np.zeros((2, round(2 / RESOLUTION) + 1), np.int64)
    extremes = {sign: (np.empty(0), np.empty((2, 0), np.int64)) for sign in (1, -1)}
    for rows, columns in tracked(list(_blocks(stratum)), "Comparing runs"):
        correlations = matrix.correlations(rows, columns)
        differ = (value[rows][:, None] != value[columns]) & (rows[:, None] < columns)
        number += int(differ.sum())
        for histogram, rho in zip(histograms, correlations, strict=True):
            defined = rho[differ & np.isfinite(rho)]
            histogram += np.bincount(np.rint((defined + 1) / RESOLUTION).astype(np.int64), minlength=len(histogram))
        flat = np.flatnonzero(differ & np.isfinite(correlations[0]))
        for sign, (values, pairs) in extremes.items():
            chosen = flat[_largest(sign * correlations[0].ravel()[flat], most)]
            values = np.concatenate([values, correlations[0].ravel()[chosen]])
            found = np.stack([rows[chosen // len(columns)], columns[chosen % len(columns)]])
            best = _largest(sign * values, most)
            extremes[sign] = values[best], np.concatenate([pairs, found], axis=1)[:, best]
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
    return PairSurvey(
        number=number,
        spearman=spearman,
        given_depth=given_depth,
        groups=pa.Table.from_pylist(of_groups, SCHEMA),
        extremes=np.unique(np.concatenate([pairs for _, pairs in extremes.values()], axis=1), axis=1),
    )


def _summarize_histogram(counts: Indices) -> CorrelationSummary:
    """Summarize correlations by their numbers in bins of `RESOLUTION` from -1 on."""
    count = int(counts.sum())
    if not count:
        return CorrelationSummary(count=0, median=np.nan, lowest=np.nan, highest=np.nan)
    filled = np.flatnonzero(counts)
    middle = np.searchsorted(counts.cumsum(), [(count + 1) // 2, count // 2 + 1])
    median, lowest, highest = (float(bins) * RESOLUTION - 1 for bins in (middle.mean(), filled[0], filled[-1]))
    return CorrelationSummary(count=count, median=median, lowest=lowest, highest=highest)


def _codes(values: Sequence[Hashable]) -> Indices:
    """Return an integer for each value, equal for equal values, by first appearance."""
    codes: dict[Hashable, int] = {}
    return np.array([codes.setdefault(value, len(codes)) for value in values], np.int64)


def _blocks(strata: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield rows and columns of scores of one stratum that are compared at once."""
    for stratum in np.unique(strata):
        columns = np.flatnonzero(strata == stratum)
        for start in range(0, len(columns) if len(columns) > 1 else 0, AT_ONCE):
            yield columns[start : start + AT_ONCE], columns


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
    """

    rho: Float64
    labels: tuple[str, ...]
    groups: tuple[str, ...]
    scores: int
    left_out: int = 0


def similarity_map(matrix: RankMatrix, labels: Sequence[str], groups: Sequence[str]) -> SimilarityMap:
    """Order scores by average-linkage clustering of one minus their rank correlation.

    Args:
        matrix: the scores.
        labels, groups: name and group of each score, in the order of ``matrix``. The last `MAX_SCORES` are shown.
    """
    shown = np.arange(len(labels))[-MAX_SCORES:]
    rho = np.concatenate(
        [matrix.correlations(shown[start : start + AT_ONCE], shown)[0] for start in range(0, len(shown), AT_ONCE)]
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
    leaves: NDArray[np.int64] = leaves_list(linkage(squareform(distance, checks=False), "average")).astype(np.int64)
    return leaves
