"""The fits of a repair, and how each becomes weights of the layer before a cut.

Let ``a`` be the inputs of the MLP's last linear map A, ``m = a A`` its output, and R what is missing in the hidden
states, all of them row vectors:

========  ==============  =============  ================
repair    fitted          R is about     folded
========  ==============  =============  ================
scale     a number s      s m            A (1 + s)
channel   a vector s      m diag(s)      A (I + diag(s))
map       a matrix W      m W            A (I + W)
refit     a matrix D      a D            A + D
========  ==============  =============  ================

``refit_all`` is ``refit`` at the last layer before each cut and at every layer behind the first one.

Where an RMS norm with gain g stands between A and the hidden states, ``p = m diag(g) / rms(m)`` is added. Scale and
channel change g, which is exact. The others are fitted with the rms of every token as it was: ``q = p (I + W)``, or
``q = (a / rms(m)) (A diag(g) + D)``, is wanted. The norm gives ``q / rms(q / g')`` for the new gain g', so g' is the
root mean square of q over tokens, by channel, for which the mean of ``rms(q / g')^2`` is 1. What is still missing is
fitted by channel once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from avss_dist.pruning.repair.projection import CapturedCall, OutputProjection, inverse_rms
from avss_dist.pruning.repair.registry import RepairMethod

_MINIMUM_GAIN = 1e-4  # of the mean gain: a channel that is always zero has none, and is divided by it


@dataclass(frozen=True)
class FitStep:
    """One least-squares fit of a repair.

    Attributes:
        features: what R is fitted from, as in `RepairMethod.features`.
        target: the module that the fit is folded into: the ``linear`` map or the ``norm``.
        form: form of the fitted matrix, one of `normal_equations.FORMS`.
    """

    features: Literal["inputs", "output"]
    target: Literal["linear", "norm"]
    form: Literal["scale", "channel", "full"]


def fit_steps(method: RepairMethod, projection: OutputProjection) -> list[FitStep]:
    """Return the fits of a repair at a projection, in order. Each sees the changes of those before it."""
    if projection.norm is None:
        return [FitStep(method.features, "linear", method.form)]
    if method.form in ("scale", "channel"):
        return [FitStep("output", "norm", method.form)]
    return [FitStep(method.features, "linear", method.form), FitStep("output", "norm", "channel")]


def features_of(step: FitStep, projection: OutputProjection, linear: CapturedCall, last: CapturedCall) -> torch.Tensor:
    """Return the features of a fit, float32[..., inputs].

    Args:
        linear, last: calls of the projection's linear map and of its last module.
    """
    if step.features == "output":
        return projection.factor * last.output.float()
    hidden = projection.factor * linear.input.float()
    return hidden if projection.norm is None else hidden * inverse_rms(linear.output, projection.eps)


@dataclass(frozen=True, eq=False)
class ProjectionWeights:
    """Weights of an output projection, float64.

    Attributes:
        linear: [inputs, outputs].
        bias: [..., outputs], or None.
        gain: [outputs], the gain of the norm, or None.
    """

    linear: torch.Tensor
    bias: torch.Tensor | None
    gain: torch.Tensor | None


def fold(
    step: FitStep, weights: ProjectionWeights, fitted: torch.Tensor, moment: torch.Tensor, factor: float
) -> ProjectionWeights:
    """Return the weights with a fit folded into them.

    Args:
        fitted: float64[inputs, outputs].
        moment: float64[inputs, inputs], the mean of x^T x over tokens, where x are the features of the step.
        factor: `OutputProjection.factor`.
    """
    linear, bias, gain = weights.linear, weights.bias, weights.gain
    if step.target == "norm":
        assert gain is not None
        return ProjectionWeights(linear, bias, gain * (1 + fitted.diagonal()))
    added, shift = (linear, bias) if gain is None else (linear * gain, None if bias is None else bias * gain)
    if step.features == "inputs":
        folded = reads = added + fitted
    else:
        reads = torch.eye(len(fitted), dtype=fitted.dtype, device=fitted.device) + fitted
        folded, shift = added @ reads, None if shift is None else shift @ reads
    if gain is None:
        return ProjectionWeights(folded, shift, None)
    sizes = ((moment @ reads) * reads).sum(0).clamp(min=0).sqrt() / abs(factor)
    sizes = sizes.clamp(min=_MINIMUM_GAIN * float(sizes.mean()))
    return ProjectionWeights(folded / sizes, None if shift is None else shift / sizes, sizes)


def parameter_paths(projection: OutputProjection, *, bias: bool) -> Mapping[str, str]:
    """Return the paths of a projection's parameters, below the layer, by the field of `ProjectionWeights`."""
    paths = {"linear": projection.weight}
    if bias:
        paths["bias"] = projection.bias
    if projection.norm is not None:
        paths["gain"] = f"{projection.norm}.weight"
    return paths
