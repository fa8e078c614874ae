"""Retention of a metric: after over before, or before over after if lower is better."""

from __future__ import annotations

import numpy as np

from avss_dist.core.names import LOSS
from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.layer_stats import Float64

NO_INTERVAL = (
    f"No interval where fewer than {MINIMUM_UNITS} samples differ from those of the whole model, or nothing is kept."
)
"""Note below tables in which a retention has no interval."""
LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")


def retention_of(metric: str, before: Float64, after: Float64) -> Float64:
    """Return the retention of a metric. For a loss, it is the retention of the perplexity."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if metric == LOSS:
            ratio: Float64 = np.exp(before - after)
        elif metric.rpartition("/")[2].partition(",")[0] in LOWER_IS_BETTER:  # SUBTASK/METRIC,FILTER
            ratio = before / after
        else:
            ratio = after / before
    return ratio
