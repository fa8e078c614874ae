"""Metrics of evaluations: their retention, and losses that reveal another start of rows than the model expects."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from avss_dist.stats.intervals import MINIMUM_UNITS
from avss_dist.stats.layer_stats import Float64

LOSS = "loss"
"""Metric of a model: nats per token; higher is worse."""
ENTROPY = "entropy"
"""Metric of a model: entropy of its predictions, in nats per token."""
CHANCE = "chance"
"""Metric of multiple choice: the accuracy of a guess."""
SPARSITY = "sparsity"
"""Metric of a model: the share of the weights of its linear maps that met a zero."""
REALIZED = "realized:"
"""Before the path of a linear map: a metric, the share of its inputs that were zero."""
NUM_WEIGHTS = "num_weights"
"""Metric of a linear map and a number format: the number of weights that are rounded."""
BITS_PER_WEIGHT = "bits_per_weight"
"""Metric of a linear map and a number format: mean bits of a weight, scales included."""
PREDICTED_RISE = "predicted"
"""Metric of a linear map and a number format: predicted rise of the loss."""
NO_INTERVAL = (
    f"No interval where fewer than {MINIMUM_UNITS} samples differ from those of the whole model, or nothing is kept."
)
"""Note below tables in which a retention has no interval."""
LOWER_IS_BETTER = ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score", "ter")
# Metrics of the task `names.ROW_START`
AS_READ = "loss_as_read"
OTHER_START = "loss_other_start"
FAR_WORSE = 1.5  # ratio of two perplexities


def retention_of(metric: str, before: Float64, after: Float64) -> Float64:
    """Return the retention of a metric. For a loss, it is the retention of the perplexity."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if metric == LOSS:
            return np.exp(before - after)
        if is_better_lower(metric):
            return before / after
        return after / before


def is_better_lower(metric: str) -> bool:
    """Whether lower values of a metric are better."""
    _, _, without_subtask = metric.rpartition("/")  # of SUBTASK/METRIC,FILTER
    name, _, _ = without_subtask.partition(",")
    return metric == LOSS or name in LOWER_IS_BETTER


def row_start_warning(losses: Mapping[str, float], model: str, corpus: str) -> tuple[float, str] | None:
    """Return the ratio of perplexities and a warning if a model seems to expect another start of rows, else None.

    Args:
        losses: results of an evaluation by metric: mean losses of the same text, in nats per token, with the start that
            the rows have (`AS_READ`) and with the other one (`OTHER_START`), if they were measured.
    """
    if AS_READ not in losses or OTHER_START not in losses:
        return None
    as_read = losses[AS_READ]
    other_start = losses[OTHER_START]
    ratio = float(np.exp(as_read - other_start))
    is_far_worse = ratio > FAR_WORSE  # which NaN is not
    if not is_far_worse:
        return None
    return ratio, (
        f"{model} has a perplexity of {np.exp(as_read):,.1f} on the first rows of {corpus}, and of "
        f"{np.exp(other_start):,.1f} on the same text with another start of each row, which it seems to "
        "expect. Write --row-start auto if it is none; else see whether its tokenizer lacks add_bos_token."
    )
