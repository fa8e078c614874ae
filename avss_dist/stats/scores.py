"""Scores from LayerStats: recipes, thresholds, ranks, intervals, baselines. Pure numpy.

AVSS (arXiv 2411.02117, section 3): NAV_i = variance_i / sum(variance), NAS_i = sparsity_i / sum(sparsity),
AVSS_i = NAV_i / NAS_i. The recipe defines "variance" and "sparsity":

========  ===============================================  =======================================
recipe    variance                                         sparsity
========  ===============================================  =======================================
pooled    pooled_variance_sum / sequence_count             near_zero / count (authors' released code)
element   m2 / count                                       near_zero / count (the paper's formula)
unit      population variance, over units, of unit means   share of units with abs(mean) < threshold
========  ===============================================  =======================================
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avss_dist.core.values import NewRow
from avss_dist.stats.catalog import RECIPES
from avss_dist.stats.intervals import (
    BOOTSTRAP_RESAMPLES,
    MINIMUM_UNITS,
    bootstrap_weights,
    jackknife_interval,
    left_out_weights,
)
from avss_dist.stats.layer_stats import HISTOGRAM_BINS, Float64, LayerKey, LayerStats, histogram_below
from avss_dist.stats.rankings import count_lowest, rank_lowest

RELATIVE_THRESHOLDS = (0.01, 0.1)  # multiples of the RMS of the layer and site; scored from stored counts

NOISY_BELOW = 100
MINIMUM_NEAR_ZERO = 5
"""Minimum number of near-zero elements for an interval of AVSS. With fewer, most shards have none."""


class Parts(NamedTuple):
    """Parts of AVSS of one site, float64[..., layers] each.

    Attributes:
        variance: variance by the recipe.
        near_zero: number of elements (or units) near zero.
        total: number of elements (or units).
    """

    variance: Float64
    near_zero: Float64
    total: Float64


class WeightedParts(NamedTuple):
    """Parts of AVSS of the merged statistics, and of each weighted statistic.

    Attributes:
        merged: float64[layers] each.
        weighted: float64[weights, layers] each.
    """

    merged: Parts
    weighted: Parts


@dataclass(frozen=True)
class Threshold:
    """A near-zero threshold. ``kind`` is ``absolute``, or ``rms`` for a multiple of the RMS of the layer and site."""

    value: float
    kind: str

    def at(self, stats: LayerStats) -> float:
        """Return the absolute value of the threshold for the layer and site of ``stats``."""
        if self.kind == "rms":
            return self.value * stats.rms
        return self.value


def avss(variance: Float64, near_zero: Float64, count: Float64, *, smoothed: bool) -> Float64:
    """Return the AVSS of layers along the last axis. Undefined values are NaN.

    Args:
        variance, near_zero, count: float64[..., layers].
        smoothed: compute the sparsity as (near_zero + 0.5) / (count + 1), which is never zero.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        if smoothed:
            sparsity = (near_zero + 0.5) / (count + 1)
        else:
            sparsity = near_zero / count
        score = share(variance) / share(np.where(count > 0, sparsity, np.nan))
    return np.where(np.isfinite(score), score, np.nan)


def share(values: Float64) -> Float64:
    """Return each value over the sum of the values that are not NaN, along the last axis."""
    return _ratio(values, np.nansum(values, axis=-1, keepdims=True))


def score_run(
    stats: Mapping[LayerKey, LayerStats],
    layers: Sequence[str],
    shards: Sequence[Mapping[LayerKey, LayerStats]] = (),
    thresholds: Sequence[Threshold] | None = None,
    sites: Sequence[str] | None = None,
) -> list[NewRow]:
    """Return every score of a run: one row per layer, site, recipe and threshold.

    Args:
        stats: the merged statistics of the run.
        layers: module path of every layer; layer ``i`` of ``n`` has depth ``(i + 0.5) / n``.
        shards: statistics by shard (or block of shards) for the intervals. Fewer than `MINIMUM_UNITS` give NaN.
        thresholds: by default, the counted thresholds and the relative ones. See `LayerStats.below`.
        sites: sites to score, by default those of ``stats``.

    Returns:
        Rows with the columns of the ``scores`` table except those that name the run.
    """
    baselines = [layer_baselines(stats, layer) for layer in range(len(layers))]
    rows: list[NewRow] = []
    for site in dict.fromkeys(site for _, site in stats):
        if sites is not None and site not in sites:
            continue
        layers_of_site = [layer for layer, other_site in stats if other_site == site]
        table = _site_table(stats, site, layers_of_site, shards, thresholds)
        for recipe in table.recipes():
            for threshold in table.thresholds:
                columns = table.score(recipe, threshold)
                for position, layer in enumerate(layers_of_site):
                    row = {
                        "layer": layer,
                        "layer_name": layers[layer],
                        "depth": (layer + 0.5) / len(layers),
                        "site": site,
                        "recipe": recipe,
                        "threshold": threshold.value,
                        "threshold_kind": threshold.kind,
                    }
                    for name, column in columns.items():
                        row[name] = column[position]
                    rows.append(row | baselines[layer])
    return rows


def _site_table(
    stats: Mapping[LayerKey, LayerStats],
    site: str,
    layers: Sequence[int],
    shards: Sequence[Mapping[LayerKey, LayerStats]],
    thresholds: Sequence[Threshold] | None,
) -> SiteTable:
    """Return the table of a site. A shard that lacks a layer has the statistics of an empty sample there."""
    merged = [stats[layer, site] for layer in layers]
    empty = LayerStats.zero(merged[0].thresholds)
    by_shard = []
    for shard in shards:
        by_shard.append([shard.get((layer, site), empty) for layer in layers])
    return SiteTable(merged, by_shard, thresholds)


def layer_baselines(stats: Mapping[LayerKey, LayerStats], layer: int) -> dict[str, float]:
    """Return each of ``stats.catalog.BASELINES`` for a layer, by name. NaN if its site was not measured.

    block_influence: ShortGPT, arXiv 2403.03853, eq. 1. angular_distance: Gromov et al., arXiv 2403.17887, section 3.2.
    """
    block = stats.get((layer, "block"))
    update = stats.get((layer, "update"))
    baselines = {
        "block_influence": np.nan,
        "angular_distance": np.nan,
        "relative_magnitude": np.nan,
        "update_variance_ratio": np.nan,
    }
    if block and block.token_count:
        baselines["block_influence"] = 1 - block.cosine_sum / block.token_count
        baselines["angular_distance"] = block.angular_sum / block.token_count
        baselines["relative_magnitude"] = block.relative_magnitude_sum / block.token_count
    if block and update and block.input_count:
        input_variance = block.input_m2 / block.input_count
        if input_variance > 0:
            baselines["update_variance_ratio"] = update.variance / input_variance
    return baselines


def weighted_baseline(name: str, block: SiteTable, update: SiteTable) -> Float64:
    """Return one of ``stats.catalog.BASELINES`` for each row of weights, float64[weights, layers].

    Where its site was not measured, it is NaN.

    Args:
        block, update: statistics of these sites with the same layers and weights.
    """
    if name == "update_variance_ratio":
        _, variance = update.element_variance
        _, input_variance = block.input_variance
        return _ratio(variance, input_variance)
    sum_of_tokens = {
        "block_influence": "cosine_sum",
        "angular_distance": "angular_sum",
        "relative_magnitude": "relative_magnitude_sum",
    }[name]
    total = block.weighted(lambda _, stats: getattr(stats, sum_of_tokens))
    mean = _ratio(total, block.weighted(lambda _, stats: stats.token_count))
    if name == "block_influence":
        return 1 - mean
    return mean


@dataclass(frozen=True, eq=False, kw_only=True)
class UnitReductions:
    """Reductions of the unit means of one layer over its units.

    Each array is float64[1 + weights]: of the merged statistics, then of each weighted statistic.

    Attributes:
        variance: population variance of the means.
        finite: number of finite means.
        near_zero: number of means below each threshold in size.
    """

    variance: Float64
    finite: Float64
    near_zero: Mapping[Threshold, Float64]


class SiteTable:
    """Statistics of one site over layers, merged and by shard, from which scores are computed.

    Args:
        merged: LayerStats by layer.
        shards: LayerStats by shard and layer.
        thresholds: by default, the counted thresholds, then the relative ones.
        weights: float64[n, shards], the weight of each shard in each of n weighted statistics. By default, the
            bootstrap weights followed by the leave-one-out weights, or none for fewer than `MINIMUM_UNITS` shards.
    """

    def __init__(
        self,
        merged: Sequence[LayerStats],
        shards: Sequence[Sequence[LayerStats]] = (),
        thresholds: Sequence[Threshold] | None = None,
        weights: Float64 | None = None,
    ) -> None:
        self.merged = merged
        self.thresholds = thresholds or default_thresholds(merged[0])
        self.shards = shards
        if weights is None and len(shards) >= MINIMUM_UNITS:
            weights = np.vstack([bootstrap_weights(len(shards)), left_out_weights(len(shards))])
        self.weights: Float64 = np.zeros((0, len(shards))) if weights is None else weights
        self._below: dict[Threshold, tuple[Float64, Float64]] = {}  # the results of `_near_zero`

    def recipes(self) -> tuple[str, ...]:
        """Return the recipes that the site has statistics for. Recipe ``unit`` needs sums by unit."""
        if all(stats.unit_sum.size for stats in self.merged):
            return tuple(RECIPES)
        return tuple(recipe for recipe in RECIPES if recipe != "unit")

    def score(self, recipe: str, threshold: Threshold) -> dict[str, list[object]]:
        """Return columns of the ``scores`` table as lists over layers. A layer with NaN or infinities has no rank."""
        merged_parts, weighted_parts = self.parts(recipe, threshold)
        variance, near_zero, count = merged_parts
        literal = np.where(near_zero > 0, avss(variance, near_zero, count, smoothed=False), np.nan)
        score = avss(variance, near_zero, count, smoothed=True)
        # A layer with NaN or infinities has no rank: what is finite of it does not measure a layer that overflows.
        finite = self.column("nonfinite_count") == 0
        low = np.full(len(score), np.nan)
        high = np.full(len(score), np.nan)
        lowest = np.full(len(score), np.nan)
        if len(self.weights):
            weighted_scores = avss(*weighted_parts, smoothed=True)
            resampled, left_out = np.split(weighted_scores, [BOOTSTRAP_RESAMPLES])
            low, high = jackknife_interval(score, left_out, scale="log")
            if recipe != "unit":  # a count of units is of all shards together
                enough = near_zero >= MINIMUM_NEAR_ZERO
                low = np.where(enough, low, np.nan)
                high = np.where(enough, high, np.nan)
            ranks = rank_lowest(np.where(finite, resampled, np.nan))
            is_lowest = ranks <= count_lowest(len(score))
            lowest = is_lowest.mean(axis=0)
        sparsity = _ratio(near_zero, count)
        # A layer without data takes no part in the sum; one with data but nothing near zero leaves no sum.
        normalized = literal / literal[~np.isnan(score)].sum()
        cumulative = np.where(np.isnan(normalized), np.nan, np.nancumsum(normalized))
        columns = {
            "variance": variance,
            "sparsity": sparsity,
            "nav": share(variance),
            "nas": share(sparsity),
            "avss": literal,
            "avss_smoothed": score,
            "avss_normalized": normalized,
            "avss_cumulative": cumulative,
            "avss_low": low,
            "avss_high": high,
            "lowest_set_probability": lowest,
        }
        ranks_of_run = rank_lowest(np.where(finite, score, np.nan))
        table: dict[str, list[object]] = {
            "count": [int(number) for number in count],
            "near_zero_count": near_zero.tolist(),
            "rank": [_as_rank(rank) for rank in ranks_of_run],
            "quality": [_quality(number) for number in near_zero],
        }
        for name, column in columns.items():
            table[name] = column.tolist()
        return table

    def parts(self, recipe: str, threshold: Threshold) -> WeightedParts:
        """Return the parts of AVSS of the merged statistics, and for each row of ``weights``.

        A relative threshold is fixed at the RMS of the whole run. Shards without an exact count at the threshold take
        the whole run's share of the elements below it in its histogram bin.
        """
        if recipe == "unit":
            return self._unit_parts(threshold)
        near_zero, weighted_near_zero = self._near_zero(threshold)
        if recipe == "pooled":
            variance, weighted_variance = self.pooled_variance
        else:
            variance, weighted_variance = self.element_variance
        return WeightedParts(
            merged=Parts(variance, near_zero, self.column("count")),
            weighted=Parts(weighted_variance, weighted_near_zero, self.weighted_count),
        )

    def _near_zero(self, threshold: Threshold) -> tuple[Float64, Float64]:
        """Return the number of elements below a threshold, merged and weighted. Several recipes need it."""
        if threshold not in self._below:
            self._below[threshold] = self._count_near_zero(threshold)
        return self._below[threshold]

    def _count_near_zero(self, threshold: Threshold) -> tuple[Float64, Float64]:
        near_zero = np.zeros(len(self.merged))
        by_shard = np.zeros((len(self.shards), len(self.merged)))
        for layer, stats in enumerate(self.merged):
            value = threshold.at(stats)
            near_zero[layer], _, _ = stats.below(value)
            by_shard[:, layer] = self._shards_below(layer, value)
        return near_zero, self.weights @ by_shard

    def _shards_below(self, layer: int, value: float) -> Sequence[float] | Float64:
        """Return the number of elements of a layer below an absolute threshold in each shard."""
        stats = self.merged[layer]
        counted = np.flatnonzero(stats.thresholds == value)
        if counted.size:  # All shards count the thresholds of the merged statistics.
            return [shard[layer].near_zero[counted[0]] for shard in self.shards]
        histograms = np.reshape([shard[layer].histogram for shard in self.shards], (-1, HISTOGRAM_BINS))
        return histogram_below(histograms, value, stats.share_below(value))

    def _unit_parts(self, threshold: Threshold) -> WeightedParts:
        """Return the parts of recipe ``unit``, whose elements are the finite means of units."""
        variance = np.stack([units.variance for units in self.units], axis=1)
        near_zero = np.stack([units.near_zero[threshold] for units in self.units], axis=1)
        finite = np.stack([units.finite for units in self.units], axis=1)
        return WeightedParts(
            merged=Parts(variance[0], near_zero[0], finite[0]),
            weighted=Parts(variance[1:], near_zero[1:], finite[1:]),
        )

    def column(self, name: str) -> Float64:
        """Return a field of the merged statistics, float64[layers]."""
        return np.array([getattr(stats, name) for stats in self.merged], float)

    def weighted(self, values: Callable[[int, LayerStats], float]) -> Float64:
        """Return weighted sums of ``values(layer position, partial)`` over shards, float64[weights, layers]."""
        by_shard = np.zeros((len(self.shards), len(self.merged)))
        for row, shard in enumerate(self.shards):
            for layer, stats in enumerate(shard):
                by_shard[row, layer] = values(layer, stats)
        return self.weights @ by_shard

    @cached_property
    def units(self) -> list[UnitReductions]:
        """Reductions of unit means by layer. Layers are reduced one at a time to bound memory."""
        return [self._reduce_units(layer) for layer in range(len(self.merged))]

    def _reduce_units(self, layer: int) -> UnitReductions:
        """Return the reductions of a layer.

        Means are NaN if no token is finite throughout, so that an overflow is not taken for a mean of zero.
        """
        merged = self.merged[layer]
        means = np.empty((1 + len(self.weights), merged.unit_sum.size))
        means[0] = merged.unit_sum / (merged.unit_count or np.nan)
        if len(self.weights):
            sums = np.zeros((len(self.shards), merged.unit_sum.size))
            tokens = np.zeros(len(self.shards))
            for row, shard in enumerate(self.shards):
                if shard[layer].unit_sum.size:
                    sums[row] = shard[layer].unit_sum
                tokens[row] = shard[layer].unit_count
            weighted_tokens = self.weights @ tokens
            means[1:] = _ratio(self.weights @ sums, weighted_tokens[:, None])
        sizes = np.abs(means)
        near_zero = {}
        for threshold in self.thresholds:
            near_zero[threshold] = _count_true(sizes < threshold.at(merged))
        return UnitReductions(
            variance=means.var(axis=-1),
            finite=_count_true(np.isfinite(means)),
            near_zero=near_zero,
        )

    @cached_property
    def weighted_count(self) -> Float64:
        """Weighted number of elements, float64[weights, layers]."""
        return self.weighted(lambda _, stats: stats.count)

    @cached_property
    def pooled_variance(self) -> tuple[Float64, Float64]:
        """Mean variance over sequences, merged and weighted."""
        variance = _ratio(self.column("pooled_variance_sum"), self.column("sequence_count"))
        sums = self.weighted(lambda _, stats: stats.pooled_variance_sum)
        sequences = self.weighted(lambda _, stats: stats.sequence_count)
        return variance, _ratio(sums, sequences)

    @cached_property
    def element_variance(self) -> tuple[Float64, Float64]:
        """Variance over elements, merged and weighted."""
        return self._variance("count", "mean", "m2")

    @cached_property
    def input_variance(self) -> tuple[Float64, Float64]:
        """Variance over elements of the block's input, merged and weighted."""
        return self._variance("input_count", "input_mean", "input_m2")

    def _variance(self, count: str, mean: str, m2: str) -> tuple[Float64, Float64]:
        """Return the variance of a sample whose moments are the given fields, merged and weighted.

        Weighted moments are taken about the merged mean, which avoids cancellation.
        """
        center = self.column(mean)

        def shifted_sum(layer: int, stats: LayerStats) -> float:
            return float(getattr(stats, count) * (getattr(stats, mean) - center[layer]))

        def shifted_squares(layer: int, stats: LayerStats) -> float:
            return float(getattr(stats, m2) + getattr(stats, count) * (getattr(stats, mean) - center[layer]) ** 2)

        number = self.weighted(lambda _, stats: getattr(stats, count))
        first = self.weighted(shifted_sum)
        second = self.weighted(shifted_squares)
        merged = _ratio(self.column(m2), self.column(count))
        return merged, _ratio(second, number) - _ratio(first, number) ** 2


def default_thresholds(stats: LayerStats) -> list[Threshold]:
    """Return the counted thresholds of statistics, then the relative ones."""
    counted = [Threshold(value=float(value), kind="absolute") for value in stats.thresholds]
    relative = [Threshold(value=value, kind="rms") for value in RELATIVE_THRESHOLDS]
    return counted + relative


def _count_true(values: NDArray[np.bool_]) -> Float64:
    """Return the number of true values along the last axis, fewer than 2^31. `numpy.count_nonzero` is slower."""
    return values.sum(axis=-1, dtype=np.int32).astype(np.float64)


def _as_rank(rank: float) -> int | None:
    return None if np.isnan(rank) else int(rank)


def _quality(near_zero: float) -> str:
    """Return how well a number of near-zero elements determines a sparsity."""
    if near_zero == 0:
        return "zero_sparsity"
    if near_zero < NOISY_BELOW:
        return "noisy_sparsity"
    return "ok"


def _ratio(numerator: Float64, denominator: Float64) -> Float64:
    return numerator / np.where(denominator > 0, denominator, np.nan)
