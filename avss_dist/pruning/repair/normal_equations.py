"""Least squares from sums: all that a linear map needs of the data, in float64, merged by addition.

Products of one batch are computed in the dtype of its data, float32 at least: half the time of float64 on a CPU.

The minimum over W of ``sum_t |y_t - x_t W|^2 + ridge |W|^2`` is ``W = (G + ridge I)^-1 C``, with ``G = sum x_t^T x_t``
and ``C = sum x_t^T y_t``. The error of any W is ``sum |y_t|^2 - 2 tr(W^T C) + tr(W^T G W)``, whatever made the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avss_dist.errors import AvssError

FORMS = ("scale", "channel", "rotated", "full")
"""Of W: a multiple of the identity, a diagonal, a diagonal in the basis of `hadamard`, any matrix."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # multiples of the mean diagonal of G


class FitError(AvssError):
    """The equations of a least-squares fit have no solution."""


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
    def zero(cls, inputs: int, outputs: int, device: torch.device | None = None) -> NormalEquations:
        """Those of no token."""
        sums = [
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((inputs, inputs), (inputs, outputs), ())
        ]
        return cls(sums[0], sums[1], sums[2], 0)

    @classmethod
    def of(cls, x: torch.Tensor, y: torch.Tensor, weight: float = 1.0) -> NormalEquations:
        """Those of some tokens, each of which counts ``weight`` times in the sums, and once in ``count``.

        Args:
            x: [tokens, inputs], of any dtype; y: [tokens, outputs].
        """
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(dtype), y.to(dtype)
        counted = (weight * x).T
        target = weight * y.double().square().sum()
        return cls((counted @ x).double(), (counted @ y).double(), target, len(x))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Those of the tokens of both."""
        return NormalEquations(
            self.gram + other.gram, self.cross + other.cross, self.target + other.target, self.count + other.count
        )

    def solve(self, form: str, ridge: float) -> torch.Tensor:
        """The best W of a form, float64[inputs, outputs].

        Args:
            form: of `FORMS`; all but the last want as many outputs as inputs.
            ridge: a multiple of the mean diagonal of G: of the mean over all inputs, or for ``channel`` and ``rotated``
                of each alone.

        Raises:
            FitError: sums are not finite, or all inputs are zero.
        """
        diagonal = self.gram.diagonal()
        if not all(torch.isfinite(sums).all() for sums in (self.gram, self.cross, self.target)):
            raise FitError(
                "Hidden states hold NaN or infinite values; nothing can be fitted to them.", "Try `dtype` float32."
            )
        if not float(diagonal.sum()) > 0:
            raise FitError(f"Nothing can be fitted: the inputs of the fit are zero (tokens: {self.count:,}).")
        if form == "full":
            return self._solve_full(ridge * diagonal.mean())
        if form == "rotated":
            basis = hadamard(len(diagonal)).to(diagonal.device)
            gram, cross = (((sums @ basis) * basis).sum(0) for sums in (self.gram, self.cross))
            return (basis * torch.where(gram > 0, cross / (gram * (1 + ridge)), 0.0)) @ basis.T
        gram, cross = diagonal, self.cross.diagonal()
        if form == "scale":
            gram, cross = gram.mean().expand_as(gram), cross.mean().expand_as(cross)
        return torch.diag(torch.where(gram > 0, cross / (gram * (1 + ridge)), 0.0))

    def _solve_full(self, added: torch.Tensor) -> torch.Tensor:
        dead = (self.gram.diagonal() == 0).double()  # inputs that are always zero: of any weight, zero is the one
        ridged = self.gram + torch.diag(added + dead)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        pivots = factor.diagonal().square() / ridged.diagonal()  # what is left of an input beside those before it
        if failed or pivots.min() <= len(pivots) * torch.finfo(torch.float64).eps:
            raise FitError(f"The equations of the fit are singular (tokens: {self.count:,}).", "Fit on more text.")
        return torch.cholesky_solve(self.cross, factor)

    def error(self, weights: torch.Tensor) -> float:
        """The sum of |y - x W|^2 over the tokens, for any W, float64[inputs, outputs]."""
        fitted = 2 * (weights * self.cross).sum() - (weights * (self.gram @ weights)).sum()
        return max(0.0, float(self.target - fitted))


def hadamard(size: int) -> torch.Tensor:
    """An orthogonal matrix float64[size, size], each of whose columns mixes a block of neighbours alike.

    Blocks are Sylvester's Hadamard matrices, as large as the powers of two in ``size``.
    """
    block = torch.ones((1, 1), dtype=torch.float64)
    while size % (2 * len(block)) == 0:
        block = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), block)
    return torch.kron(torch.eye(size // len(block), dtype=torch.float64), block / len(block) ** 0.5)


@dataclass(frozen=True, eq=False)
class Fit:
    """A map, and what it is worth on tokens that it has not seen.

    Attributes:
        weights: float64[inputs, outputs].
        ridge: the best of those tried; None where the strongest does not help, and ``weights`` are zero.
        before, after: sums of squares on those tokens, without the map and with it.
    """

    weights: torch.Tensor
    ridge: float | None
    before: float
    after: float


def fit_plainly(seen: NormalEquations, held_back: NormalEquations, form: str) -> Fit:
    """The map that is fitted to some tokens without a ridge, whatever it does to others.

    Raises:
        FitError: as `NormalEquations.solve`.
    """
    weights = seen.solve(form, 0.0)
    return Fit(weights, 0.0, float(held_back.target), held_back.error(weights))


def fit(seen: NormalEquations, held_back: NormalEquations, form: str, ridges: Sequence[float] = RIDGES) -> Fit:
    """The map that is fitted to some tokens with the ridge that gives the least error on others.

    From the strongest, weaker ridges are tried as long as they lessen it: what comes behind follows noise ever more.

    Raises:
        FitError: as `NormalEquations.solve`.
    """
    before = float(held_back.target)
    best = Fit(torch.zeros_like(seen.cross), None, before, before)
    for ridge in sorted(ridges, reverse=True):
        weights = seen.solve(form, ridge)
        after = held_back.error(weights)
        if after >= best.after:
            break
        best = Fit(weights, ridge, before, after)
    return best
