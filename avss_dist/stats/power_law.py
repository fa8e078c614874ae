"""Estimator of the exponent of a power law. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from avss_dist.stats.layer_stats import Float64


def hill_exponent(eigenvalues: Sequence[float] | Float64) -> float:
    """Return the exponent of a power law by Hill's estimator over the larger half of the eigenvalues.

    The estimate is ``1 + m / sum(log(x_i / x_min))`` (Clauset, Shalizi and Newman, arXiv 0706.1062, equation 3.1).
    """
    values = np.sort(np.asarray(eigenvalues, np.float64))
    values = values[values > 0]
    chosen = values[-max(2, len(values) // 2) :]
    total = float(np.log(chosen / chosen[0]).sum())
    return 1 + len(chosen) / total if total > 0 else np.inf
