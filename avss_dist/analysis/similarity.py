"""Map of the similarity of many layer rankings, ordered so that alike ones stand beside each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from avss_dist.analysis.rank_matrix import RankMatrix
from avss_dist.stats.layer_stats import Float64

MAX_SCORES = 5_000  # clustering takes memory and time with the square of their number
CELLS = 120  # along an axis
AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True, eq=False)
class SimilarityMap:
    """Rank correlations of many scores, ordered by hierarchical clustering; neighbours share a cell if there are many.

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
    return SimilarityMap(
        rho=_cell_means(rho, cell),
        labels=tuple(_describe([labels[index] for index in indices]) for indices in members),
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


def _cell_means(rho: Float64, cell: NDArray[np.int64]) -> Float64:
    """Return the means over pairs of cells. ``cell`` is ascending."""
    starts = np.flatnonzero(np.diff(cell, prepend=-1))

    def sums(values: Float64) -> Float64:
        return np.add.reduceat(np.add.reduceat(values, starts, axis=0), starts, axis=1)

    counts = sums(np.isfinite(rho).astype(float))
    return np.divide(sums(np.nan_to_num(rho)), counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def _describe(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
