"""Agreement of the layer rankings of groups of models, from all of their pairs."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from avss_dist.analysis.agreement import CorrelationSummary
from avss_dist.analysis.rank_matrix import Indices, RankMatrix
from avss_dist.stats.layer_stats import Float64
from avss_dist.system.streams import tracked

AT_ONCE = 512  # rows of a block of pairs: with 20,000 runs, a block is 80 MB
MAX_GROUPS = 50  # with more, the table of all pairs of groups tells nobody anything
RESOLUTION = 1e-5  # of the median of many correlations

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
STATISTICS = ("spearman", "given_depth")


@dataclass(frozen=True, kw_only=True)
class Member:
    """Position of one score in a comparison.

    Attributes:
        stratum: only scores of equal strata are compared.
        value: value in which the two scores of a pair differ.
        model: name of the model.
        group: label of the group.
    """

    stratum: Hashable
    value: Hashable
    model: str
    group: str


@dataclass(kw_only=True)
class PairSurvey:
    """Correlations of all pairs of a comparison, summarized in bounded memory.

    Attributes:
        number: number of pairs that differ in their value.
        groups: rows of `SCHEMA`; empty without groups.
        extremes: int64[2, ...], the pairs that are most and least alike, ascending in each pair.
    """

    number: int = 0
    groups: pa.Table = field(default_factory=SCHEMA.empty_table)
    extremes: NDArray[np.int64] = field(default_factory=lambda: np.empty((2, 0), np.int64))
    _histograms: dict[str, NDArray[np.int64]] = field(
        default_factory=lambda: {name: np.zeros(round(2 / RESOLUTION) + 1, np.int64) for name in STATISTICS}
    )

    def summary(self, statistic: str) -> CorrelationSummary:
        """Summarize a correlation, ``spearman`` or ``given_depth``, over all pairs, to `RESOLUTION`."""
        counts = self._histograms[statistic]
        count = int(counts.sum())
        if not count:
            return CorrelationSummary(count=0, median=np.nan, lowest=np.nan, highest=np.nan)
        cumulative, filled = counts.cumsum(), np.flatnonzero(counts)
        middle = np.searchsorted(cumulative, [(count + 1) // 2, count // 2 + 1])
        median, lowest, highest = (float(bins) * RESOLUTION - 1 for bins in (middle.mean(), filled[0], filled[-1]))
        return CorrelationSummary(count=count, median=median, lowest=lowest, highest=highest)

    def count(self, statistic: str, correlations: Float64) -> None:
        """Add correlations, float64[pairs], to the summary. NaN marks undefined ones."""
        bins = np.rint((correlations[np.isfinite(correlations)] + 1) / RESOLUTION).astype(np.int64)
        counts = self._histograms[statistic]
        counts += np.bincount(bins, minlength=len(counts))


def survey_pairs(
    matrix: RankMatrix, members: Sequence[Member], *, by: str, across_models: bool, most: int
) -> PairSurvey:
    """Correlate all pairs of equal strata and different values, and the pairs within and between groups.

    Args:
        matrix: the scores.
        members: the position of each score, in the order of ``matrix``.
        by: name of the groups' property.
        across_models: groups are compared over pairs of different models. Otherwise, over pairs of one model in
            different groups.
        most: number of the most, and of the least, similar pairs to return.
    """
    survey, sums = PairSurvey(), _GroupSums(members, across_models=across_models)
    codes = {name: _codes([getattr(member, name) for member in members]) for name in ("stratum", "value")}
    extremes = _Extremes(most)
    for rows, columns in tracked(list(_blocks(codes["stratum"])), "Comparing runs"):
        correlations = dict(zip(STATISTICS, matrix.correlations(rows, columns), strict=True))
        differ = (codes["value"][rows][:, None] != codes["value"][columns]) & (rows[:, None] < columns)
        survey.number += int(differ.sum())
        for name, values in correlations.items():
            survey.count(name, values[differ])
        extremes.offer(correlations["spearman"], differ, rows, columns)
        sums.add(correlations, rows, columns)
    survey.extremes = extremes.pairs()
    survey.groups = sums.table(by)
    return survey


def _codes(values: Sequence[Hashable]) -> Indices:
    """Return an integer for each value, equal for equal values."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(value, len(known)) for value in values], np.int64)


def _blocks(strata: Indices) -> Iterator[tuple[Indices, Indices]]:
    """Yield rows and columns of scores of one stratum that are compared at once."""
    for stratum in np.unique(strata):
        columns = np.flatnonzero(strata == stratum)
        for start in range(0, len(columns) if len(columns) > 1 else 0, AT_ONCE):
            yield columns[start : start + AT_ONCE], columns


class _Extremes:
    """The most and the least similar of all pairs that are offered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._found: dict[int, list[tuple[Float64, NDArray[np.int64]]]] = {1: [], -1: []}

    def offer(self, rho: Float64, wanted: NDArray[np.bool_], rows: Indices, columns: Indices) -> None:
        """Consider the wanted pairs of a block."""
        flat = np.flatnonzero(wanted & np.isfinite(rho))
        values = rho.ravel()[flat]
        for sign, candidates in self._found.items():
            chosen = _largest(sign * values, self._most)
            pairs = np.stack([rows[flat[chosen] // len(columns)], columns[flat[chosen] % len(columns)]])
            candidates.append((values[chosen], pairs))
            if len(candidates) > 1:
                merged = np.concatenate([value for value, _ in candidates])
                best = _largest(sign * merged, self._most)
                pairs = np.concatenate([pair for _, pair in candidates], axis=1)
                candidates[:] = [(merged[best], pairs[:, best])]

    def pairs(self) -> NDArray[np.int64]:
        """Return the pairs, each once: int64[2, pairs]."""
        every = [pair for candidates in self._found.values() for _, pair in candidates]
        return np.unique(np.concatenate([np.empty((2, 0), np.int64), *every], axis=1), axis=1)


def _largest(values: Float64, most: int) -> Indices:
    """Return the indices of the largest values, the earlier of equal ones first."""
    if len(values) > most:
        bound = np.partition(values, len(values) - most)[len(values) - most]
        candidates = np.flatnonzero(values >= bound)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:most]


class _GroupSums:
    """Sums of the correlations within and between groups, of which the means follow."""

    def __init__(self, members: Sequence[Member], *, across_models: bool) -> None:
        self._across_models = across_models
        self._groups = list(dict.fromkeys(member.group for member in members))
        self._models = _codes([member.model for member in members])
        self._useful = 1 < len(self._groups) <= MAX_GROUPS
        self._membership = np.eye(len(self._groups))[_codes([member.group for member in members])]
        shape = len(self._groups), len(self._groups)
        self._sums = {name: np.zeros(shape) for name in STATISTICS}
        self._counts = {name: np.zeros(shape) for name in STATISTICS}

    def add(self, correlations: dict[str, Float64], rows: Indices, columns: Indices) -> None:
        """Add a block of correlations; each pair is met twice, once from each side."""
        if not self._useful:
            return
        same_model = self._models[rows][:, None] == self._models[columns]
        wanted = ~same_model if self._across_models else same_model & (rows[:, None] != columns)
        of_rows, of_columns = self._membership[rows].T, self._membership[columns]
        for name, values in correlations.items():
            defined = wanted & np.isfinite(values)
            self._sums[name] += of_rows @ np.where(defined, values, 0.0) @ of_columns
            self._counts[name] += of_rows @ defined @ of_columns

    def table(self, by: str) -> pa.Table:
        """Return the means of all pairs of groups that have pairs, as rows of `SCHEMA`."""
        rows: list[dict[str, Any]] = []
        for a, first in enumerate(self._groups if self._useful else ()):
            for b in range(a, len(self._groups)):
                if pairs := self._counts["spearman"][a, b]:
                    means = {name: self._mean(name, a, b) for name in STATISTICS}
                    number = round(pairs / 2 if a == b else pairs)
                    rows.append({"by": by, "a": first, "b": self._groups[b], "pairs": number, **means})
        return pa.Table.from_pylist(rows, SCHEMA)

    def _mean(self, name: str, a: int, b: int) -> float | None:
        """Return the mean of a correlation over the pairs of two groups, or None if none is defined."""
        number = self._counts[name][a, b]
        return float(self._sums[name][a, b] / number) if number else None
