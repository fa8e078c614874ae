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

Least squares are solved from sums over tokens, in float64, merged by addition. Products of one batch are computed in
the dtype of its data, float32 at least: half the time of float64 on a CPU. The minimum over W of
``sum_t |y_t - x_t W|^2 + ridge |W|^2`` is ``W = (G + ridge I)^-1 C``, with ``G = sum x_t^T x_t`` and
``C = sum x_t^T y_t``. The error of any W is ``sum |y_t|^2 - 2 tr(W^T C) + tr(W^T G W)``, whatever made the sums.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from avss_dist.core.errors import AvssError
from avss_dist.models.structure.layers import Routing
from avss_dist.models.watching import CapturedCall
from avss_dist.pruning.repair.projection import OutputProjection, inverse_rms
from avss_dist.pruning.repair.registry import REPAIRS, RepairMethod

ROUNDS = 2
"""Rounds of fits of experts."""
_MINIMUM_GAIN = 1e-4
"""Smallest gain, as a share of the mean gain. Weights are divided by it, and a channel that is always zero has none."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Ridges to try, as multiples of the mean diagonal of G."""
_SOLVING_COPIES = 3
"""Matrices of the size of the sums that a fit needs: the sums of a batch, the factor and the solution with a ridge."""


@dataclass(frozen=True, eq=False)
class NormalEquations:
    """Sums over tokens.

    Attributes:
        gram: float64[inputs, inputs], the sum of x^T x.
        cross: float64[inputs, outputs], the sum of x^T y.
        target: float64[], the sum of |y|^2.
        count: tokens.
    """

    gram: torch.Tensor
    cross: torch.Tensor
    target: torch.Tensor
    count: int

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device | None = None) -> NormalEquations:
        """Return the sums over no token."""
        return cls(
            gram=torch.zeros(inputs, inputs, dtype=torch.float64, device=device),
            cross=torch.zeros(inputs, outputs, dtype=torch.float64, device=device),
            target=torch.zeros((), dtype=torch.float64, device=device),
            count=0,
        )

    @staticmethod
    def peak_bytes(inputs: int, outputs: int, fits: int = 1) -> int:
        """Return the most bytes that the sums of some fits over two sets of tokens take, and the solution of one."""
        bytes_of_sums = torch.float64.itemsize * inputs * (inputs + outputs)
        return (2 * fits + _SOLVING_COPIES) * bytes_of_sums

    @classmethod
    def from_tokens(cls, x: torch.Tensor, y: torch.Tensor, weight: float | torch.Tensor = 1.0) -> NormalEquations:
        """Return the sums over some tokens. Each counts ``weight`` times in the sums, and once in ``count``.

        Args:
            x: [tokens, inputs], of any dtype; y: [tokens, outputs].
            weight: of all tokens, or [tokens, 1].
        """
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x = x.to(dtype)
        y = y.to(dtype)
        weighted = (weight * x).T
        squares = y.double().square().sum(dim=1, keepdim=True)
        return cls(
            gram=(weighted @ x).double(),
            cross=(weighted @ y).double(),
            target=(weight * squares).sum(),
            count=len(x),
        )

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Return the sums over the tokens of both operands."""
        return NormalEquations(
            gram=self.gram + other.gram,
            cross=self.cross + other.cross,
            target=self.target + other.target,
            count=self.count + other.count,
        )

    def solve(self, form: str, ridge: float) -> torch.Tensor:
        """Return the W of least error, float64[inputs, outputs].

        Args:
            form: ``channel`` (a diagonal) or ``full`` (any matrix); ``channel`` needs as many outputs as inputs.
            ridge: multiple of the mean diagonal of G, or for ``channel`` of each input's own entry.

        Raises:
            AvssError: sums are not finite, or all inputs are zero.
        """
        diagonal = self.gram.diagonal()
        if not all(torch.isfinite(sums).all() for sums in (self.gram, self.cross, self.target)):
            raise AvssError(
                "Hidden states hold NaN or infinite values; nothing can be fitted to them.", "Try `dtype` float32."
            )
        if not float(diagonal.sum()) > 0:
            raise AvssError(f"Nothing can be fitted: the inputs of the fit are zero (tokens: {self.count:,}).")
        if form == "channel":
            factors = self.cross.diagonal() / (diagonal * (1 + ridge))
            return torch.diag(torch.where(diagonal > 0, factors, 0.0))
        return torch.cholesky_solve(self.cross, self._factor(ridge))

    def removal_errors(self, start: torch.Tensor, ridge: float) -> torch.Tensor:
        """Return by how much the ridged error grows without each input if the other weights are fitted again.

        Args:
            start: float64[inputs, outputs], weights to which the W of least error is added.
            ridge: as for `solve`.

        Returns:
            float64[inputs].
        """
        factor = self._factor(ridge)
        weights = start + torch.cholesky_solve(self.cross, factor)
        return weights.square().sum(1) / torch.cholesky_inverse(factor).diagonal()

    def _factor(self, ridge: float) -> torch.Tensor:
        """Return the lower Cholesky factor of G with a ridge.

        Raises:
            AvssError: the equations are singular.
        """
        diagonal = self.gram.diagonal()
        # Inputs that are always zero get a weight of zero: a diagonal of one keeps their equations regular.
        dead = (diagonal == 0).double()
        ridged = self.gram + torch.diag(ridge * diagonal.mean() + dead)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        # The share of each input's square that no input before it explains.
        unexplained = factor.diagonal().square() / ridged.diagonal()
        if failed or unexplained.min() <= len(unexplained) * torch.finfo(torch.float64).eps:
            raise AvssError(f"The equations of the fit are singular (tokens: {self.count:,}).", "Fit on more text.")
        return factor

    def error(self, weights: torch.Tensor) -> float:
        """Return the sum of |y - x W|^2 over the tokens for any W, float64[inputs, outputs]."""
        fitted = 2 * (weights * self.cross).sum() - (weights * (self.gram @ weights)).sum()
        return max(0.0, float(self.target - fitted))


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A fitted matrix and its errors on tokens that it was not fitted to.

    Attributes:
        weights: float64[inputs, outputs].
        ridge: the best ridge that was tried; None if even the strongest does not help, and ``weights`` are zero.
        before, after: sums of squares on the held-back tokens, without the matrix and with it.
    """

    weights: torch.Tensor
    ridge: float | None
    before: float
    after: float


def fit_ridge(
    fitted: NormalEquations, held_back: NormalEquations, form: str, ridges: Sequence[float] = RIDGES
) -> RidgeFit:
    """Fit a matrix to some tokens with the ridge that gives the least error on others.

    Ridges are tried from the strongest to weaker ones as long as the error decreases; still weaker ones fit noise. The
    matrix is zero if there is no token to fit to.

    Raises:
        AvssError: as `NormalEquations.solve`.
    """
    before = float(held_back.target)
    best = RidgeFit(torch.zeros_like(fitted.cross), ridge=None, before=before, after=before)
    if not fitted.count:
        return best
    for ridge in sorted(ridges, reverse=True):
        weights = fitted.solve(form, ridge)
        after = held_back.error(weights)
        if after >= best.after:
            break
        best = RidgeFit(weights, ridge, before, after)
    return best


def fit_steps(method: RepairMethod, projection: OutputProjection) -> list[RepairMethod]:
    """Return the fits of a repair at a projection, in order. Each sees the changes of those before it."""
    if projection.norm is not None:
        if method.form == "channel":
            return [method]
        return [method, REPAIRS["channel"]]
    if projection.down and method.features == "inputs":
        return [method] * ROUNDS
    return [method]


class Features(NamedTuple):
    """Features of the tokens of a batch that reach a matrix.

    Attributes:
        inputs: float32[n, inputs], the features.
        tokens: indices of the tokens in the batch, int64[n], or a slice.
        weights: weights of the tokens, [n, 1], or of all.
    """

    inputs: torch.Tensor
    tokens: torch.Tensor | slice
    weights: torch.Tensor | float


def features_of(
    step: RepairMethod,
    projection: OutputProjection,
    linear: CapturedCall,
    last: CapturedCall,
    borrowed: torch.Tensor | None = None,
) -> list[Features]:
    """Return the features of each matrix of a fit: of each remaining expert, or of one linear map.

    Those of an expert are its units times the sum of the gates of each token that it gets.

    Args:
        linear, last: calls of the projection's linear map and of its last module.
        borrowed: values of borrowed neurons, [rows, tokens, neurons], which are features like the inputs of the linear
            map. Behind them is a feature that is always 1 if the map has a bias. None if the repair borrows none.
    """
    if linear.units is not None:
        return _features_of_experts(projection, linear.units)
    if step.features == "output":
        hidden = projection.factor * last.output.float()
    else:
        inputs = linear.input.float()
        if borrowed is not None:
            inputs = torch.cat([inputs, borrowed.float()], dim=-1)
            if "bias" in projection.paths:
                inputs = torch.cat([inputs, torch.ones_like(inputs[..., :1])], dim=-1)
        hidden = projection.factor * inputs
        if projection.norm is not None:
            hidden = hidden * inverse_rms(linear.output, projection.eps)
    return [Features(hidden.flatten(0, 1), tokens=slice(None), weights=1.0)]


def _features_of_experts(projection: OutputProjection, chosen: Routing) -> list[Features]:
    """Return the features of each remaining expert, from the units and gates of the chosen experts of each token."""
    gates = chosen.gates.float()
    total = gates.sum(dim=1)
    features = []
    for expert in projection.remaining:
        tokens, slots = torch.where((chosen.index == expert) & (gates > 0))
        units = chosen.hidden[tokens, slots].float()
        inputs = (projection.factor * total[tokens])[:, None] * units
        weights = (gates[tokens, slots] / total[tokens])[:, None]
        features.append(Features(inputs, tokens, weights))
    return features


def fold(
    step: RepairMethod, weights: Mapping[str, torch.Tensor], fitted: torch.Tensor, moment: torch.Tensor, factor: float
) -> dict[str, torch.Tensor]:
    """Return the weights of an output projection with a fit folded into them.

    Args:
        weights: ``linear`` float64[..., inputs, outputs], of routed experts a matrix each; if there is one, ``bias``
            [..., outputs]; behind a norm, its ``gain`` [outputs].
        fitted: float64[..., inputs, outputs].
        moment: float64[inputs, inputs], the mean of x^T x over tokens, where x are the features of the step.
        factor: `OutputProjection.factor`.
    """
    gain = weights.get("gain")
    if step.form == "channel" and gain is not None:
        return {**weights, "gain": gain * (1 + fitted.diagonal())}
    added = {name: value for name, value in weights.items() if name != "gain"}
    if gain is not None:
        added = {name: value * gain for name, value in added.items()}
    # `wanted` is the map from the features of the step to the output that is wanted.
    if step.features == "inputs":
        wanted = added["linear"] + fitted
        added["linear"] = wanted
    else:
        wanted = torch.eye(len(fitted), dtype=fitted.dtype, device=fitted.device) + fitted
        added = {name: value @ wanted for name, value in added.items()}
    if gain is None:
        return added
    mean_squares = ((moment @ wanted) * wanted).sum(0).clamp(min=0)
    new_gain = mean_squares.sqrt() / abs(factor)
    new_gain = new_gain.clamp(min=_MINIMUM_GAIN * float(new_gain.mean()))
    folded = {name: value / new_gain for name, value in added.items()}
    folded["gain"] = new_gain
    return folded
