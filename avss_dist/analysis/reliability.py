"""Reliability of a measured order of layers, which bounds the agreement of any score with it."""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc

from avss_dist.core.intervention import InterventionKey
from avss_dist.core.names import LOSS
from avss_dist.pruning.ground_truth import LayerTruth
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.rankings import spearman
from avss_dist.warehouse.reader import Warehouse

SPLITS, SEED = 200, 0


def increases(store: Warehouse, truth: LayerTruth) -> Float64:
    """Return the rise of each sequence's loss by the truth's change of each layer, float64[sequences, layers], in nats.

    The array has no sequences if the warehouse lacks the cells of the evaluation.
    """
    where = (pc.field("run_id") == truth.run_id) & (pc.field("task") == truth.task) & (pc.field("metric") == LOSS)
    rows = store.table("cells", where=where).to_pylist()
    by_key: dict[InterventionKey, dict[int, list[float]]] = {}
    for row in rows:
        by_key.setdefault(InterventionKey.of_row(row), {})[row["part"]] = row["samples"]
    samples = {key: np.concatenate([parts[part] for part in sorted(parts)]) for key, parts in by_key.items()}
    layers, whole = sorted(truth.values), InterventionKey()
    if samples.keys() != {whole, *map(truth.key, layers)} or len({len(one) for one in samples.values()}) > 1:
        return np.zeros((0, len(layers)))
    return np.stack([samples[truth.key(layer)] - samples[whole] for layer in layers], axis=1)


def reliability(samples: Float64) -> float:
    """Return the expected correlation of a measurement with a second one on other text of the same size.

    This is Spearman's correlation of two random halves of the sequences, averaged over splits and extrapolated to the
    whole by the formula of Spearman and Brown (1910): ``2 r / (1 + r)``. The splits are seeded.

    Args:
        samples: float64[sequences, layers].

    Returns:
        The correlation. NaN for fewer than four sequences, or if the halves do not correlate positively.
    """
    number = len(samples)
    if number < 4:
        return np.nan
    rng = np.random.default_rng(SEED)
    correlations = []
    for _ in range(SPLITS):
        order = rng.permutation(number)
        half, other = samples[order[: number // 2]].sum(axis=0), samples[order[number // 2 :]].sum(axis=0)
        correlations.append(spearman(half, other))
    r = float(np.mean(correlations))
    return 2 * r / (1 + r) if r > 0 else np.nan


def misranked(score: Float64, truth: Float64) -> float | None:
    """Return the share of untied pairs of layers that a score puts in the opposite order, or None if all are tied.

    Args:
        score, truth: float64[layers]. Layers with NaN in either are left out.
    """
    both = np.isfinite(score) & np.isfinite(truth)
    x, y = score[both], truth[both]
    product = np.sign(np.subtract.outer(x, x)) * np.sign(np.subtract.outer(y, y))  # every pair twice
    ordered = int(np.count_nonzero(product))
    return int(np.count_nonzero(product < 0)) / ordered if ordered else None
