"""Retention of a metric: after over before, with an interval from the same samples of both."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite, nan

import numpy as np

from avss_dist.stats.intervals import MINIMUM_UNITS, jackknife_interval
from avss_dist.stats.retention import kept
from avss_dist.tasks.base import Result


@dataclass(frozen=True, kw_only=True)
class Retained:
    """A retention: 1 keeps all. Where less is better, it is before over after; of a loss, of the perplexities.

    Attributes:
        value: the retention.
        low, high: ends of the interval of ``settings.INTERVAL`` over paired samples; NaN where the two have different
            numbers of samples, where fewer than ``MINIMUM_UNITS`` samples differ, or where the retention is zero or
            infinite.
    """

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether both ends of the interval are known."""
        return isfinite(self.low) and isfinite(self.high)


def retained(before: Result, after: Result) -> Retained:
    """Return how much of ``before`` is left in ``after``: the same metric of the same task, of the same samples."""
    value = kept(before.metric, *(np.array(r.value) for r in (before, after)))
    low = high = nan
    if len(before.samples) == len(after.samples) and _differing(before, after) >= MINIMUM_UNITS:
        left_out = kept(before.metric, before.left_out, after.left_out)
        low, high = map(float, jackknife_interval(value, left_out, scale="log"))
    return Retained(value=float(value), low=low, high=high)


def _differing(before: Result, after: Result) -> int:
    """Return how many samples differ. Of an accuracy most may not, and those say nothing of how much varies."""
    return int(np.count_nonzero((before.samples != after.samples) | (before.weights != after.weights)))
