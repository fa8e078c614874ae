"""The fits of a repair, and how each becomes weights of the layer before a cut.

Let ``a`` be the inputs of the MLP's last linear map A, ``m = a A`` its output, and R what is missing in the hidden
states, all of them row vectors:

========  ==============  =============  ================
repair    fitted          R is about     folded
========  ==============  =============  ================
channel   a vector s      m diag(s)      A (I + diag(s))
map       a matrix W      m W            A (I + W)
refit     a matrix D      a D            A + D
========  ==============  =============  ================

``refit_all`` is ``refit`` at the last layer before each cut and at every layer behind the first one.

Where an RMS norm with gain g stands between A and the hidden states, ``p = m diag(g) / rms(m)`` is added.
`channel` changes g, which is exact. The others are fitted with the rms of every token as it was: ``q = p (I + W)``, or
``q = (a / rms(m)) (A diag(g) + D)``, is wanted. The norm gives ``q / rms(q / g')`` for the new gain g', so g' is the
root mean square of q over tokens, by channel, for which the mean of ``rms(q / g')^2`` is 1. What is still missing is
fitted by channel once more.

Of routed experts e with units ``a_e``, gates ``g_e`` and down projections ``A_e``, ``m`` is the sum over a token's
experts of ``g_e a_e A_e``. `refit` fits each remaining expert alone, on the tokens that it gets, to all that is missing
there: the minimum over ``D_e`` of ``sum_t (g_e / s) |R - s a_e D_e|^2``, where s is the sum of the token's gates. By
Jensen's inequality, the sum of these errors over experts is at least the error of all ``D_e`` together, and equal at
``D_e = 0``, so that the fits do not make it worse. They need products of the units of one expert at a time, where joint
least squares would need those of all units of all experts, to which a few rounds come close.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from avss_dist.models.expert_units import ChosenUnits
from avss_dist.pruning.repair.projection import CapturedCall, ExpertsProjection, OutputProjection, inverse_rms
from avss_dist.pruning.repair.registry import RepairMethod

ROUNDS = 2  # of fits of experts
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
    form: Literal["channel", "full"]


def fit_steps(method: RepairMethod, projection: OutputProjection) -> list[FitStep]:
    """Return the fits of a repair at a projection, in order. Each sees the changes of those before it."""
    if projection.norm is None:
        rounds = ROUNDS if isinstance(projection, ExpertsProjection) and method.features == "inputs" else 1
        return [FitStep(method.features, "linear", method.form)] * rounds
    if method.form == "channel":
        return [FitStep("output", "norm", "channel")]
    return [FitStep(method.features, "linear", method.form), FitStep("output", "norm", "channel")]


@dataclass(frozen=True, eq=False)
class Features:
    """Features of one fitted matrix, of the tokens of a batch that reach it.

    Attributes:
        x: float32[n, inputs].
        tokens: int64[n], the tokens that reach the matrix, of all of the batch; None if all do, in order.
        weight: float32[n, 1], how much each token counts; None if equally.
    """

    x: torch.Tensor
    tokens: torch.Tensor | None = None
    weight: torch.Tensor | None = None


def features_of(
    step: FitStep, projection: OutputProjection, linear: CapturedCall, last: CapturedCall
) -> list[Features]:
    """Return the features of each matrix of a fit: of each remaining expert, or of one linear map.

    Args:
        linear, last: calls of the projection's linear map and of its last module.
    """
    if isinstance(projection, ExpertsProjection) and linear.units is not None:
        return [_features_of_expert(expert, projection.factor, linear.units) for expert in projection.remaining]
    if step.features == "output":
        return [Features(projection.factor * last.output.float().flatten(0, 1))]
    hidden = projection.factor * linear.input.float()
    if projection.norm is not None:
        hidden = hidden * inverse_rms(linear.output, projection.eps)
    return [Features(hidden.flatten(0, 1))]


def _features_of_expert(expert: int, factor: float, chosen: ChosenUnits) -> Features:
    """Return the features of an expert's fit: its units times the sum of the gates of each token that it gets."""
    gates = chosen.gates.float()
    total = gates.sum(dim=1)
    tokens, slots = torch.where((chosen.index == expert) & (gates > 0))
    x = (factor * total[tokens])[:, None] * chosen.units[tokens, slots].float()
    return Features(x, tokens, (gates[tokens, slots] / total[tokens])[:, None])


@dataclass(frozen=True, eq=False)
class ProjectionWeights:
    """Weights of an output projection, float64.

    Attributes:
        linear: [..., inputs, outputs], of routed experts a matrix each.
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
        fitted: float64[..., inputs, outputs].
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
