"""Least squares from sums over tokens, in float64, merged by addition.

Products of one batch are computed in the dtype of its data, float32 at least: half the time of float64 on a CPU.

The minimum over W of ``sum_t |y_t - x_t W|^2 + ridge |W|^2`` is ``W = (G + ridge I)^-1 C``, with ``G = sum x_t^T x_t``
and ``C = sum x_t^T y_t``. The error of any W is ``sum |y_t|^2 - 2 tr(W^T C) + tr(W^T G W)``, whatever made the sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from avss_dist.core.errors import AvssError

FORMS = ("channel", "full")
"""Forms of W: a diagonal, any matrix."""
RIDGES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # multiples of the mean diagonal of G
_SOLVING_COPIES = 3  # the sums of a batch, and the factor and the solution with a ridge


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
    def empty(cls, inputs: int, outputs: int, device: torch.device | None = None) -> NormalEquations:
        """Return the sums over no token."""
        sums = [
            torch.zeros(shape, dtype=torch.float64, device=device)
            for shape in ((inputs, inputs), (inputs, outputs), ())
        ]
        return cls(sums[0], sums[1], sums[2], 0)

    @staticmethod
    def peak_bytes(inputs: int, outputs: int, fits: int = 1) -> int:
        """Return the most bytes that the sums of some fits over two sets of tokens take, and the solution of one."""
        return (2 * fits + _SOLVING_COPIES) * 8 * inputs * (inputs + outputs)

    @classmethod
    def from_tokens(cls, x: torch.Tensor, y: torch.Tensor, weight: float | torch.Tensor = 1.0) -> NormalEquations:
        """Return the sums over some tokens. Each counts ``weight`` times in the sums, and once in ``count``.

        Args:
            x: [tokens, inputs], of any dtype; y: [tokens, outputs].
            weight: of all tokens, or [tokens, 1].
        """
        dtype = torch.promote_types(torch.promote_types(x.dtype, y.dtype), torch.float32)
        x, y = x.to(dtype), y.to(dtype)
        counted = (weight * x).T
        target = (weight * y.double().square().sum(dim=1, keepdim=True)).sum()
        return cls((counted @ x).double(), (counted @ y).double(), target, len(x))

    def __add__(self, other: NormalEquations) -> NormalEquations:
        """Return the sums over the tokens of both operands."""
        return NormalEquations(
            self.gram + other.gram, self.cross + other.cross, self.target + other.target, self.count + other.count
        )

    def solve(self, form: str, ridge: float) -> torch.Tensor:
        """Return the W of least error, float64[inputs, outputs].

        Args:
            form: one of `FORMS`; ``channel`` needs as many outputs as inputs.
            ridge: multiple of the mean diagonal of G, or for ``channel`` of each input's own entry.

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
        return torch.diag(torch.where(diagonal > 0, self.cross.diagonal() / (diagonal * (1 + ridge)), 0.0))

    def _solve_full(self, added: torch.Tensor) -> torch.Tensor:
        dead = (self.gram.diagonal() == 0).double()  # inputs that are always zero get a weight of zero
        ridged = self.gram + torch.diag(added + dead)
        factor, failed = torch.linalg.cholesky_ex(ridged)
        pivots = (
            factor.diagonal().square() / ridged.diagonal()
        )  # the part of an input that the inputs before it do not explain
        if failed or pivots.min() <= len(pivots) * torch.finfo(torch.float64).eps:
            raise FitError(f"The equations of the fit are singular (tokens: {self.count:,}).", "Fit on more text.")
        return torch.cholesky_solve(self.cross, factor)

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

    Ridges are tried from the strongest to weaker ones as long as the error decreases; still weaker ones fit noise.

    Raises:
        FitError: as `NormalEquations.solve`.
    """
    before = float(held_back.target)
    best = RidgeFit(torch.zeros_like(fitted.cross), None, before, before)
    for ridge in sorted(ridges, reverse=True):
        weights = fitted.solve(form, ridge)
        after = held_back.error(weights)
        if after >= best.after:
            break
        best = RidgeFit(weights, ridge, before, after)
    return best
