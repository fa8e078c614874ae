"""Power law of the eigenvalues of each layer's weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from avss_dist.core.intervention import NO_INTERVENTION, Intervention
from avss_dist.core.settings import fingerprint
from avss_dist.models.causal_lm import LanguageModel
from avss_dist.stats.power_law import ks_exponent
from avss_dist.tasks.base import Row
from avss_dist.tasks.gradients import matrices

ALPHA = "spectral_alpha"
MIN_EIGENVALUES = 8  # of a matrix that is taken


@dataclass(frozen=True)
class Spectra:
    """Mean exponent of the power laws of the weight matrices of each layer.

    - ``spectral_alpha``: 1 minus the mean, over the matrices of the layer, of the exponent of the power law of the tail
      of the eigenvalues of W^T W (Martin and Mahoney, arXiv 1810.01075; Martin, Peng and Mahoney, Nature Communications
      12, 2021). A low exponent is said to be that of a well-trained layer, so a low score is unimportant. The tail is
      chosen by its Kolmogorov-Smirnov distance (arXiv 0706.1062).
    """

    @property
    def key(self) -> str:
        """See `tasks.base.Measure`."""
        return fingerprint(measure="spectra")

    def __call__(self, model: LanguageModel, intervention: Intervention = NO_INTERVENTION) -> list[Row]:
        """See `tasks.base.Measure`. Removed layers, and those without a matrix of that size, have no rows."""
        rows = []
        for layer in model.layers:
            if layer.index in intervention.removed:
                continue
            with model.running(layer), torch.no_grad():
                exponents = [_exponent(matrix) for weight in matrices(layer.module) for matrix in _unstacked(weight)]
            finite = [exponent for exponent in exponents if np.isfinite(exponent)]
            if finite:
                rows.append(
                    Row(metric=ALPHA, samples=np.array([1 - np.mean(finite)]), weights=np.ones(1), layer=layer.index)
                )
        return rows


def _unstacked(weight: torch.Tensor) -> list[torch.Tensor]:
    """Return the matrices of a weight: itself, or those of a stack, such as experts."""
    return list(weight) if weight.dim() == 3 else [weight]


def _exponent(matrix: torch.Tensor) -> float:
    """Return the exponent of the power law of the eigenvalues of W^T W; infinity for a small matrix."""
    if min(matrix.shape) < MIN_EIGENVALUES:
        return float("inf")
    values = torch.linalg.svdvals(matrix.float())
    return ks_exponent(values.double().square().cpu().numpy())
