"""Estimators of the exponent of a power law. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avss_dist.stats.layer_stats import Float64


def hill_exponent(eigenvalues: Sequence[float] | Float64, tail: int | None = None) -> float:
    """Return the exponent of a power law by Hill's estimator over the ``tail`` largest eigenvalues, by default half.

    The estimate is ``1 + m / sum(log(x_i / x_min))`` (Clauset, Shalizi and Newman, arXiv 0706.1062, equation 3.1).
    """
    values = np.sort(np.asarray(eigenvalues, np.float64))
    values = values[values > 0]
    m = max(2, len(values) // 2) if tail is None else tail
    chosen = values[-m:]
    total = float(np.log(chosen / chosen[0]).sum())
    return 1 + len(chosen) / total if total > 0 else np.inf


def ks_exponent(eigenvalues: Sequence[float] | Float64) -> float:
    """Return the exponent for the tail with the smallest Kolmogorov-Smirnov distance to its power law.

    Tails of at least a tenth of the eigenvalues are tried (arXiv 0706.1062, section 3.3).
    """
    values = np.sort(np.asarray(eigenvalues, np.float64))
    values = values[values > 0]
    best = (np.inf, np.inf)
    for m in range(max(2, len(values) // 10), len(values) + 1):
        tail = values[-m:]
        exponent = hill_exponent(values, m)
        if not np.isfinite(exponent):
            continue
        model = 1 - (tail / tail[0]) ** (1 - exponent)
        distance = float(np.abs(np.arange(m) / m - model).max())
        best = min(best, (distance, exponent))
    return best[1]
