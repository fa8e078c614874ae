"""Rank correlations of many layer scores at once: the ranks are a matrix, the correlations of all pairs a product."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from avss_dist.analysis.agreement import Scores, rank_correlations
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import MIN_VALUES, average_ranks, given_depth

Indices = NDArray[np.int64]


class RankMatrix:
    """Ranks of the layers of many scores, from which the correlations of any block of pairs are computed.

    The correlations equal those of `agreement.rank_correlations`, to which scores with missing or infinite values are
    left. Scores of different depth are compared at the relative depths of the one with fewer layers.

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
        for size_a in np.unique(self._sizes[rows]):
            for size_b in np.unique(self._sizes[columns]):
                of_rows, of_columns = (
                    np.flatnonzero(self._sizes[indices] == size)
                    for indices, size in ((rows, size_a), (columns, size_b))
                )
                block = np.ix_(of_rows, of_columns)
                rho[block], partial[block] = self._block(
                    rows[of_rows], columns[of_columns], int(min(size_a, size_b)), regular=bool(size_a and size_b)
                )
        return rho, partial

    def _block(self, rows: Indices, columns: Indices, size: int, *, regular: bool) -> tuple[Float64, Float64]:
        """Return the correlations of scores that are all compared at the same ``size`` depths."""
        if not regular:
            a, b = (index.ravel() for index in np.meshgrid(rows, columns, indexing="ij"))
            rho, partial = rank_correlations(self._scores, np.minimum(a, b), np.maximum(a, b))
            shape = len(rows), len(columns)
            return rho.reshape(shape), partial.reshape(shape)
        (x, of_x), (y, of_y) = (self._ranks(indices, size) for indices in (rows, columns))
        with np.errstate(invalid="ignore", divide="ignore"):
            rho = (x @ y.T) / np.sqrt(np.outer((x**2).sum(axis=1), (y**2).sum(axis=1)))
        if size < MIN_VALUES:
            rho[:] = np.nan
        return rho, given_depth(rho, of_x[:, None], of_y[None, :])

    def _ranks(self, indices: Indices, size: int) -> tuple[Float64, Float64]:
        """Return the centered, doubled ranks of scores at a grid of depths, and their correlation with depth.

        Doubled average ranks are integers, so that every sum over them is exact.
        """
        place, ranks, with_depth = self._ranked[size]
        return ranks[place[indices]], with_depth[place[indices]]

    @cached_property
    def _ranked(self) -> dict[int, tuple[Indices, Float64, Float64]]:
        """Rows of each score, ranks and correlations with depth, by the number of depths."""
        ranked = {}
        for size in np.unique(self._sizes[self._sizes > 0]).tolist():
            members = np.flatnonzero(self._sizes >= size)
            depth = self._scores[int(np.flatnonzero(self._sizes == size)[0])][0]
            values = np.array([self._at(depth, index, size) for index in members.tolist()])
            ranks = 2 * average_ranks(values) - (size + 1)
            order = 2 * np.arange(size) - (size - 1.0)
            with np.errstate(invalid="ignore", divide="ignore"):
                with_depth = ranks @ order / np.sqrt((ranks**2).sum(axis=1) * (order**2).sum())
            place = np.full(len(self._scores), -1, np.int64)
            place[members] = np.arange(len(members))
            ranked[size] = place, ranks, with_depth
        return ranked

    def _at(self, depth: Float64, index: int, size: int) -> Float64:
        """Return the values of a score at given depths."""
        at, values = self._scores[index]
        return values if len(values) == size else np.interp(depth, at, values)
