"""What is left of a metric: after over before, with an interval from the same samples of both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from avss_dist.stats.rankings import bootstrap_interval, bootstrap_weights
from avss_dist.stats.retention import kept
from avss_dist.tasks.base import Result


@dataclass(frozen=True, kw_only=True)
class Retained:
    """A retention: 1 keeps all. Where less is better, it is before over after; of a loss, of the perplexities.

    Attributes:
        value: the retention.
        low, high: the interval of ``config.INTERVAL``, by the paired bootstrap over samples (Efron and Tibshirani, An
            Introduction to the Bootstrap, 1993, chapter 13); NaN where samples are not the same in number, or only one.
    """

    value: float
    low: float
    high: float


def retained(before: Result, after: Result) -> Retained:
    """How much of ``before`` is left in ``after``: the same metric of the same task, of the same samples."""
    value = float(kept(before.metric, *(np.array([r.value]) for r in (before, after)))[0])
    number = len(before.samples)
    if number < 2 or len(after.samples) != number:
        return Retained(value=value, low=float("nan"), high=float("nan"))
    drawn = bootstrap_weights(number)
    ratios = kept(before.metric, *(drawn @ r.samples / (drawn @ r.weights) for r in (before, after)))
    if not np.isfinite(ratios).any():
        return Retained(value=value, low=float("nan"), high=float("nan"))
    with np.errstate(invalid="ignore"):  # between infinities
        low, high = bootstrap_interval(ratios[~np.isnan(ratios)])
    return Retained(value=value, low=float(low), high=float(high))
