"""Results of metrics over all parts of a task, and comparisons of two of them over the same samples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import isfinite, nan

import numpy as np

from avss_dist.core.intervention import InterventionKey, Removals
from avss_dist.core.values import TableRow
from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import LOSS, retention_of
from avss_dist.warehouse.reader import grouped


@dataclass(frozen=True, eq=False)
class Result:
    """Result of a metric over all parts of a task.

    Attributes:
        intervention: key of the change to the model; of a task that fits a patch, with that patch.
        layer: index of the layer that the metric describes; None for the whole model.
        samples, weights: float64[n], those of all parts in their order.
    """

    metric: str
    intervention: InterventionKey
    layer: int | None
    samples: Float64 = field(repr=False)
    weights: Float64 = field(repr=False)

    @property
    def removed(self) -> Removals:
        """Removed layers and sublayers."""
        return self.intervention.removed

    @property
    def value(self) -> float:
        """Weighted mean of the samples: ``sum(samples) / sum(weights)``."""
        return float(self.samples.sum() / self.weights.sum())

    @property
    def left_out(self) -> Float64:
        """Values without one sample each (jackknife), float64[n]. NaN if no weight remains."""
        with np.errstate(invalid="ignore", divide="ignore"):
            values: Float64 = (self.samples.sum() - self.samples) / (self.weights.sum() - self.weights)
        return values

    @property
    def stderr(self) -> float:
        """Standard error of the value, a ratio of means, linearized (Cochran, Sampling Techniques, 1977, section 6.4).

        NaN for a single sample.
        """
        n = len(self.samples)
        if n < 2:
            return float("nan")
        residuals = self.samples - self.value * self.weights
        return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / self.weights.sum())

    def metrics(self) -> list[tuple[str, float, float]]:
        """Return name, value and standard error, and those of the perplexity of a loss (by the delta method)."""
        metrics = [(self.metric, self.value, self.stderr)]
        if self.metric == LOSS:
            perplexity = float(np.exp(self.value))
            metrics.append(("perplexity", perplexity, perplexity * self.stderr))
        return metrics


@dataclass(frozen=True, kw_only=True)
class Retention:
    """Retention of a metric: after over before, or before over after if lower is better. 1 means no change.

    The retention of a loss is that of its perplexity.

    Attributes:
        value: the retention.
        low, high: ends of the 95% interval over paired samples; NaN where the two have different numbers of samples,
            where fewer than ``MINIMUM_UNITS`` samples differ, or where the retention is zero or infinite.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, before: Result, after: Result) -> Retention:
        """Return the retention between two results of one metric on the same samples."""
        value = _retention(before, after)
        # Most samples of an accuracy may be equal, and equal samples say nothing about its variation.
        if _num_differing(before, after) < MINIMUM_UNITS:
            return cls(value=value, low=nan, high=nan)
        left_out = retention_of(before.metric, before.left_out, after.left_out)
        low, high = jackknife_interval(np.array(value), left_out, scale="log")
        return cls(value=value, low=float(low), high=float(high))

    def describe(self) -> str:
        """Return the retention as text, with its interval if it is known."""
        text = f"{self.value:z.1%} kept"
        if self.has_interval:
            text += f" (95% interval {self.low:z.1%} to {self.high:z.1%})"
        return text

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return isfinite(self.low) and isfinite(self.high)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Difference of a statistic between two models: that of one less that of the other, over the same samples.

    Attributes:
        value: the difference. Positive where the first model's statistic is larger.
        low, high: ends of the 95% interval over paired samples; NaN where the difference is not finite, or where fewer
            than ``MINIMUM_UNITS`` samples differ.
        num_samples: number of samples that both models have.
        num_differing: number of samples that are not equal.
    """

    value: float
    low: float
    high: float
    num_samples: int
    num_differing: int

    @classmethod
    def of_metric(cls, own: Result, other: Result) -> Difference:
        """Return the difference of a metric between two results on the same samples, in the unit of the metric."""
        return cls._paired(own, other, own.value - other.value, own.left_out - other.left_out)

    @classmethod
    def of_perplexity(cls, own: Result, other: Result) -> Difference:
        """Return the difference of the perplexity between two losses on the same samples."""
        with np.errstate(over="ignore", invalid="ignore"):
            value = np.exp(own.value) - np.exp(other.value)
            left_out = np.exp(own.left_out) - np.exp(other.left_out)
        return cls._paired(own, other, float(value), left_out)

    @classmethod
    def of_retention(cls, own: Result, other: Result, whole: Result) -> Difference:
        """Return the difference of the retention of a metric, as a share (0.01 is a percentage point).

        Args:
            whole: the result of the whole model of both, on the same samples.
        """
        own_retention = _retention(whole, own)
        other_retention = _retention(whole, other)
        own_left_out = retention_of(whole.metric, whole.left_out, own.left_out)
        other_left_out = retention_of(whole.metric, whole.left_out, other.left_out)
        with np.errstate(invalid="ignore"):
            return cls._paired(own, other, own_retention - other_retention, own_left_out - other_left_out)

    @classmethod
    def _paired(cls, own: Result, other: Result, value: float, left_out: Float64) -> Difference:
        """Return a difference with its jackknife interval.

        Args:
            value: the difference over all samples.
            left_out: the difference without each sample, float64[n].
        """
        num_differing = _num_differing(own, other)
        low = high = nan
        if num_differing >= MINIMUM_UNITS:
            ends = jackknife_interval(np.array(value), left_out)
            low = float(ends[0])
            high = float(ends[1])
        return cls(value=value, low=low, high=high, num_samples=len(own.samples), num_differing=num_differing)

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return isfinite(self.low) and isfinite(self.high)

    @property
    def may_be_chance(self) -> bool:
        """Whether the interval contains zero. False without an interval."""
        return self.has_interval and self.low <= 0 <= self.high


def metric_differences(own: Result, other: Result) -> list[tuple[str, Difference]]:
    """Return the name and the difference of each of `Result.metrics`: the metric, and the perplexity of a loss."""
    differences = [(own.metric, Difference.of_metric(own, other))]
    if own.metric == LOSS:
        differences.append(("perplexity", Difference.of_perplexity(own, other)))
    return differences


def _retention(before: Result, after: Result) -> float:
    """Return the retention of a metric between two results."""
    return float(retention_of(before.metric, np.array(before.value), np.array(after.value)))


def _num_differing(before: Result, after: Result) -> int:
    """Return the number of samples that differ between two results, or 0 if they have different numbers of samples."""
    if len(before.samples) != len(after.samples):
        return 0
    is_different = (before.samples != after.samples) | (before.weights != after.weights)
    return int(np.count_nonzero(is_different))


def combine(rows: Iterable[TableRow], num_parts: int) -> list[Result]:
    """Return the results of one task from rows of ``cells``. Metrics with a missing part are left out.

    Rows of the same part are the same measurement, of which one counts.
    """
    results = []
    by_result = grouped(rows, lambda row: (row["metric"], InterventionKey.of_row(row), row["layer"]))
    for (metric, intervention, layer), rows_of_result in by_result.items():
        by_part = {row["part"]: row for row in rows_of_result}
        if len(by_part) < num_parts:
            continue
        in_order = [by_part[part] for part in sorted(by_part)]
        samples = np.concatenate([np.asarray(row["samples"], np.float64) for row in in_order])
        weights = np.concatenate([np.asarray(row["weights"], np.float64) for row in in_order])
        results.append(Result(metric, intervention, layer, samples, weights))
    return results
