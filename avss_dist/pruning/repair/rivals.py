"""Rivals that change the stream itself behind a cut. No weight holds such a patch: they are evaluated, and not written.

With X the stream after the last layer before a cut, and Y the whole model's after the last layer that is removed there:

============  ===============  ===================================================================================
repair        X becomes        with
============  ===============  ===================================================================================
prune_comp    a X              a: the mean length of Y over that of X: Prune&Comp (Chen et al., arXiv 2507.18212)
linear_patch  X H diag(d) H^T  d: by channel, the mean size of Y H over that of X H: LinearPatch (Chen et al., arXiv
                               2505.24680, without its training), H of `normal_equations.hadamard`
============  ===============  ===================================================================================

Prune&Comp folds its number into all earlier weights, which changes no prediction: norms are blind to it. Means are over
the tokens that are fitted to, so the first of each row takes no part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from avss_dist.pruning.repair.normal_equations import FitError, NormalEquations, hadamard
from avss_dist.pruning.repair.outlet import Outlet, RepairError
from avss_dist.pruning.repair.record import RepairedCut
from avss_dist.pruning.repair.streams import AtCut, Streams
from avss_dist.pruning.repair.text import Portion
from avss_dist.settings import REPAIRS, RIVAL_PATCHES


def require_foldable(by: str) -> None:
    """Refuse a repair that no weight can hold.

    Raises:
        RepairError: it is one of ``settings.RIVAL_PATCHES``.
    """
    if by in RIVAL_PATCHES:
        raise RepairError(
            f"The repair {by} changes the stream itself behind each cut; no weight of the checkpoint holds that.",
            f"Compare it in an experiment (`repairs`), or prune with another `repair`: {', '.join(REPAIRS)}.",
        )


def fit_stream(
    by: str, streams: Streams, after: int, removed: tuple[int, ...], read: Sequence[Portion], numbers: Iterable[int]
) -> tuple[torch.Tensor, RepairedCut]:
    """What the stream after a layer, behind which others are removed, is multiplied by: float32[], or [units, units].

    Args:
        by: one of ``settings.RIVAL_PATCHES``.
        numbers: of the batches.

    Raises:
        FitError: hidden states are not finite, or zero.
    """
    sums = _Sums(by, read)
    streams.visit(Outlet(streams.layer(after), "", None, 1.0), removed[-1], sums.see, numbers)
    basis, (pruned, whole) = sums.basis, sums.sizes
    if not (torch.isfinite(pruned) & torch.isfinite(whole) & (pruned > 0)).all():
        raise FitError("Hidden states hold NaN or infinite values, or nothing but zeros.", "Try `dtype` float32.")
    patch = (basis * (whole / pruned)) @ basis.T
    errors = [sums.held_back.error(one) for one in (torch.zeros_like(patch), patch - torch.eye(len(patch)).to(patch))]
    before, now = ((error / sums.length) ** 0.5 for error in errors)
    value = (whole / pruned)[0] if by == "prune_comp" else patch
    done = RepairedCut(after=after, removed=removed, ridges=(), error_before=before, error_after=now)
    return value.float().cpu(), done


class _Sums:
    """What the means are of, over tokens that are fitted to; and the equations of what is missing on those held back.

    Attributes:
        basis: [units, units], in which the stream is scaled.
        sizes: [2, units], of the pruned model's stream and of the whole one's.
        length: the sum of squares of the whole model's stream.
    """

    basis: torch.Tensor
    sizes: torch.Tensor
    held_back: NormalEquations

    def __init__(self, by: str, read: Sequence[Portion]) -> None:
        self._by, self._read, self.length = by, read, 0.0

    def see(self, number: int, whole: torch.Tensor, now: AtCut) -> None:
        """See `streams.Visit`."""
        portion, device = self._read[number], now.stream.device
        x, y = now.stream.double(), whole.to(device).double()
        if not hasattr(self, "basis"):
            units = x.shape[-1]
            self.basis = (hadamard(units) if self._by == "linear_patch" else torch.eye(units).double()).to(device)
            self.sizes = torch.zeros(2, units, dtype=torch.float64, device=device)
            self.held_back = NormalEquations.zero(units, units, device)
        fitted, held = (torch.from_numpy(mask).to(device) for mask in (portion.fitted, portion.held_back))
        self.sizes += portion.weight * torch.stack([self._size(x[fitted]).sum(0), self._size(y[fitted]).sum(0)])
        self.held_back += NormalEquations.of(x[held], y[held] - x[held], portion.weight)
        self.length += portion.weight * float(y[held].square().sum())

    def _size(self, stream: torch.Tensor) -> torch.Tensor:
        """Of tokens: [tokens, units], or [tokens, 1] of all units together."""
        if self._by == "prune_comp":
            return stream.norm(dim=-1, keepdim=True)
        return (stream @ self.basis).abs()
