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
from typing import Any

import numpy as np

from avss_dist.core.registry import RECIPES
from avss_dist.stats.intervals import (
    BOOTSTRAP_RESAMPLES,
    MINIMUM_UNITS,
    bootstrap_weights,
    jackknife_interval,
    left_out_weights,
)
from avss_dist.stats.layer_stats import Float64, LayerKey, LayerStats, histogram_below
from avss_dist.stats.rankings import count_lowest, rank_lowest

RELATIVE_THRESHOLDS = (0.01, 0.1)  # multiples of the RMS of the layer and site; scored from stored counts

NOISY_BELOW = 100
MINIMUM_NEAR_ZERO = 5
"""Minimum number of near-zero elements for an interval of AVSS. With fewer, most shards have none."""
Parts = tuple[Float64, Float64, Float64]
"""Parts of AVSS, float64[..., layers] each: variance, near-zero elements, elements."""


@dataclass(frozen=True)
class Threshold:
    """A near-zero threshold. ``kind`` is ``absolute``, or ``rms`` for a multiple of the RMS of the layer and site."""

    value: float
    kind: str

    def at(self, stats: LayerStats) -> float:
        """Return the absolute value of the threshold for the layer and site of ``stats``."""
        return self.value * stats.rms if self.kind == "rms" else self.value


def avss(variance: Float64, near_zero: Float64, count: Float64, *, smoothed: bool) -> Float64:
    """Return the AVSS of layers along the last axis. Undefined values are NaN.

    Args:
        variance, near_zero, count: float64[..., layers].
        smoothed: compute the sparsity as (near_zero + 0.5) / (count + 1), which is never zero.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        sparsity = (near_zero + 0.5) / (count + 1) if smoothed else near_zero / count
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
) -> list[dict[str, Any]]:
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
    baselines = {layer: layer_baselines(stats, layer) for layer in range(len(layers))}
    rows: list[dict[str, Any]] = []
    for site in dict.fromkeys(site for _, site in stats if sites is None or site in sites):
        present = [layer for layer, s in stats if s == site]
        merged = [stats[layer, site] for layer in present]
        zero = LayerStats.zero(merged[0].thresholds)
        by_shard = [[shard.get((layer, site), zero) for layer in present] for shard in shards]
        table = SiteTable(merged, by_shard, thresholds)
        for recipe in table.recipes():
            for threshold in table.thresholds:
                columns = table.score(recipe, threshold)
                rows += [
                    {
                        "layer": layer,
                        "layer_name": layers[layer],
                        "depth": (layer + 0.5) / len(layers),
                        "site": site,
                        "recipe": recipe,
                        "threshold": threshold.value,
                        "threshold_kind": threshold.kind,
                        **{name: column[position] for name, column in columns.items()},
                        **baselines[layer],
                    }
                    for position, layer in enumerate(present)
                ]
    return rows


def layer_baselines(stats: Mapping[LayerKey, LayerStats], layer: int) -> dict[str, float]:
    """Return each of ``registry.BASELINES`` for a layer, by name. NaN if its site was not measured.

    block_influence: ShortGPT, arXiv 2403.03853, eq. 1. angular_distance: Gromov et al., arXiv 2403.17887, section 3.2.
    """
    block, update = stats.get((layer, "block")), stats.get((layer, "update"))
    tokens = block.token_count if block else 0
    mean = {
        name: getattr(block, f"{name}_sum") / tokens if tokens else np.nan
        for name in ("cosine", "angular", "relative_magnitude")
    }
    input_variance = block.input_m2 / block.input_count if block and block.input_count else np.nan
    return {
        "block_influence": 1 - mean["cosine"],
        "angular_distance": mean["angular"],
        "relative_magnitude": mean["relative_magnitude"],
        "update_variance_ratio": update.variance / input_variance if update and input_variance > 0 else np.nan,
    }


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
        self.thresholds = thresholds or (
            *(Threshold(value=float(t), kind="absolute") for t in merged[0].thresholds),
            *(Threshold(value=t, kind="rms") for t in RELATIVE_THRESHOLDS),
        )
        self.shards = shards
        if weights is None and len(shards) >= MINIMUM_UNITS:
            weights = np.vstack([bootstrap_weights(len(shards)), left_out_weights(len(shards))])
        self.weights: Float64 = np.zeros((0, len(shards))) if weights is None else weights

    def recipes(self) -> tuple[str, ...]:
        """Return the recipes that the site has statistics for. Recipe ``unit`` needs sums by unit."""
        return tuple(r for r in RECIPES if r != "unit" or all(s.unit_sum.size for s in self.merged))

    def score(self, recipe: str, threshold: Threshold) -> dict[str, list[Any]]:
        """Return columns of the ``scores`` table as lists over layers. A layer with NaN or infinities has no rank."""
        (variance, near_zero, count), weighted_parts = self.parts(recipe, threshold)
        literal = np.where(near_zero > 0, avss(variance, near_zero, count, smoothed=False), np.nan)
        score = avss(variance, near_zero, count, smoothed=True)
        finite = self.column("nonfinite_count") == 0  # the finite rest does not measure a layer that overflows
        low = high = lowest = np.full(len(score), np.nan)
        if len(self.weights):
            resampled, left_out = np.split(avss(*weighted_parts, smoothed=True), [BOOTSTRAP_RESAMPLES])
            low, high = jackknife_interval(score, left_out, scale="log")
            enough = (near_zero >= MINIMUM_NEAR_ZERO) | (recipe == "unit")  # which counts units, of all shards together
            low, high = (np.where(enough, ends, np.nan) for ends in (low, high))
            lowest = (rank_lowest(np.where(finite, resampled, np.nan)) <= count_lowest(len(score))).mean(axis=0)
        sparsity = _ratio(near_zero, count)
        # A layer without data takes no part in the sum; one with data but nothing near zero leaves no sum.
        normalized = literal / literal[~np.isnan(score)].sum()
        columns = {
            "variance": variance,
            "sparsity": sparsity,
            "nav": share(variance),
            "nas": share(sparsity),
            "avss": literal,
            "avss_smoothed": score,
            "avss_normalized": normalized,
            "avss_cumulative": np.where(np.isnan(normalized), np.nan, np.nancumsum(normalized)),
            "avss_low": low,
            "avss_high": high,
            "lowest_set_probability": lowest,
        }
        return {
            "count": [int(c) for c in count],
            "near_zero_count": near_zero.tolist(),
            "rank": [None if np.isnan(r) else int(r) for r in rank_lowest(np.where(finite, score, np.nan))],
            "quality": np.select(
                [near_zero == 0, near_zero < NOISY_BELOW], ["zero_sparsity", "noisy_sparsity"], "ok"
            ).tolist(),
            **{name: column.tolist() for name, column in columns.items()},
        }

    def parts(self, recipe: str, threshold: Threshold) -> tuple[Parts, Parts]:
        """Return the parts of AVSS of the merged statistics, and for each row of ``weights``.

        A relative threshold is fixed at the RMS of the whole run. Shards without an exact count at the threshold take
        the whole run's share of the elements below it in its histogram bin.
        """
        if recipe == "unit":
            by_layer = [(variance, near_zero[threshold], finite) for variance, finite, near_zero in self.units]
            variance, near_zero, finite = (np.stack(part, axis=1) for part in zip(*by_layer, strict=True))
            return (variance[0], near_zero[0], finite[0]), (variance[1:], near_zero[1:], finite[1:])
        at = [threshold.at(s) for s in self.merged]
        shares = [s.share_below(t) for s, t in zip(self.merged, at, strict=True)]

        def count_below(layer: int, stats: LayerStats) -> float:
            if (counted := np.flatnonzero(stats.thresholds == at[layer])).size:
                return float(stats.near_zero[counted[0]])
            return float(histogram_below(stats.histogram, at[layer], shares[layer]))

        merged, weighted = self.pooled_variance if recipe == "pooled" else self.element_variance
        near_zero = np.array([s.below(t)[0] for s, t in zip(self.merged, at, strict=True)])
        counts = self.weighted(lambda _, s: s.count)
        return (merged, near_zero, self.column("count")), (weighted, self.weighted(count_below), counts)

    def column(self, name: str) -> Float64:
        """Return a field of the merged statistics, float64[layers]."""
        return np.array([getattr(s, name) for s in self.merged], float)

    def weighted(self, values: Callable[[int, LayerStats], float]) -> Float64:
        """Return weighted sums of ``values(layer position, partial)`` over shards, float64[weights, layers]."""
        by_shard = np.array([[values(i, s) for i, s in enumerate(shard)] for shard in self.shards], float)
        return self.weights @ by_shard.reshape(len(self.shards), len(self.merged))

    @cached_property
    def units(self) -> list[tuple[Float64, Float64, dict[Threshold, Float64]]]:
        """Reductions of unit means over units by layer: variance, finite means, and means near zero by threshold.

        Each is float64[1 + weights]: of the merged statistics and, with weights, of each weighted statistic. Layers
        are reduced one at a time to bound memory. Means are NaN if no token is finite throughout, so that an overflow
        is not taken for a mean of zero.
        """
        reduced = []
        for layer, merged in enumerate(self.merged):
            means = merged.unit_sum[None] / (merged.unit_count or np.nan)
            if len(self.weights):
                partials = [shard[layer] for shard in self.shards]
                sums = np.stack([p.unit_sum if p.unit_sum.size else np.zeros_like(means[0]) for p in partials])
                tokens = self.weights @ np.array([p.unit_count for p in partials], float)
                means = np.vstack([means, _ratio(self.weights @ sums, tokens[:, None])])
            sizes = np.abs(means)
            near_zero = {t: (sizes < t.at(merged)).sum(axis=-1).astype(float) for t in self.thresholds}
            reduced.append((means.var(axis=-1), np.isfinite(means).sum(axis=-1).astype(float), near_zero))
        return reduced

    @cached_property
    def pooled_variance(self) -> tuple[Float64, Float64]:
        """Mean variance over sequences, merged and weighted."""
        variance = _ratio(self.column("pooled_variance_sum"), self.column("sequence_count"))
        sums = self.weighted(lambda _, s: s.pooled_variance_sum)
        return variance, _ratio(sums, self.weighted(lambda _, s: s.sequence_count))

    @cached_property
    def element_variance(self) -> tuple[Float64, Float64]:
        """Variance over elements, merged and weighted.

        Weighted moments are taken about the merged mean, which avoids cancellation.
        """
        center = self.column("mean")
        count = self.weighted(lambda _, s: s.count)
        first = self.weighted(lambda i, s: s.count * (s.mean - center[i]))
        second = self.weighted(lambda i, s: s.m2 + s.count * (s.mean - center[i]) ** 2)
        return _ratio(self.column("m2"), self.column("count")), _ratio(second, count) - _ratio(first, count) ** 2


def _ratio(numerator: Float64, denominator: Float64) -> Float64:
    return numerator / np.where(denominator > 0, denominator, np.nan)
