"""What is fitted at an outlet, and how the fit becomes weights of the layer that stays.

With ``a`` the inputs of the MLP's last linear map A, ``m = a A`` its output and R what is missing in the stream, all of
them row vectors:

========  ==============  ===========================  =========================
repair    fitted          so that R is about           folded
========  ==============  ===========================  =========================
scale     one number s    s m                          A (1 + s)
channel   a vector s      m diag(s)                    A (I + diag(s))
rotated   a vector s      m H diag(s) H^T              A (I + H diag(s) H^T)
map       a matrix W      m W                          A (I + W)
refit     a matrix D      a D                          A + D
========  ==============  ===========================  =========================

``refit_all`` is ``refit`` at the last layer before each cut and at every layer behind the first one. ``refit_around``
is ``refit``, and of the first layer behind each cut the other linear maps too (`readers`). ``refit_full`` is both.
``replace_me`` is ``map`` without a ridge, whatever held-back text says: ReplaceMe's least squares (Shopkhoev et al.,
arXiv 2505.02819), whose transform of the MLP's output is I + W.

H is a fixed rotation, made of Hadamard matrices, which spreads large channels over their neighbours: LinearPatch's
(arXiv 2505.24680), whose patch is of the whole stream, so that it is a matrix more; of m alone it can be folded.

Where an RMS norm with gain g stands between A and the stream, ``p = m diag(g) / rms(m)`` is added. Scale and channel
change g, which is exact. The others are fitted with the rms of every token as it was: ``q = p (I + W)``, or
``q = (a / rms(m)) (A diag(g) + D)``, is wanted. The norm gives ``q / rms(q / g')`` for the new gain g', so g' is the
root mean square of q over tokens, by channel, for which the mean of ``rms(q / g')^2`` is 1. What is still missing is
fitted by channel once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from avss_dist.pruning.repair.outlet import Outlet, Seen, inverse_rms
from avss_dist.settings import REFITS

FULL = {"map": "output", "replace_me": "output", **dict.fromkeys(REFITS, "inputs")}
"""What any matrix is fitted from (`Step.reads`), by repair."""
_LEAST_GAIN = 1e-4  # of the mean gain: a channel that is always zero has none, and is divided by it


@dataclass(frozen=True)
class Step:
    """One fit.

    Attributes:
        reads: what R is fitted from: ``inputs`` of the linear map, or what the MLP adds (``output``).
        changes: the module that the fit is folded into: ``linear`` or ``norm``.
        form: of the fitted matrix, one of `normal_equations.FORMS`.
    """

    reads: str
    changes: str
    form: str


def steps(repair: str, outlet: Outlet) -> list[Step]:
    """The fits of a repair at an outlet, one after the other; each sees what the one before it has changed."""
    reads, form = (FULL[repair], "full") if repair in FULL else ("output", repair)
    if outlet.norm is None:
        return [Step(reads, "linear", form)]
    if form in ("scale", "channel"):
        return [Step("output", "norm", form)]
    return [Step(reads, "linear", form), Step("output", "norm", "channel")]


def features(step: Step, outlet: Outlet, linear: Seen, last: Seen) -> torch.Tensor:
    """What R is fitted from, as the modules of an outlet saw it: [..., inputs], in float32."""
    if step.reads == "output":
        return outlet.factor * last.output.float()
    hidden = outlet.factor * linear.input.float()
    return hidden if outlet.norm is None else hidden * inverse_rms(linear.output, outlet.eps)


def num_unknowns(step: Step, inputs: int) -> int:
    """Of one output of a fit."""
    return inputs if step.form == "full" else 1


@dataclass(frozen=True, eq=False)
class Weights:
    """Those of an outlet, float64: ``linear`` [inputs, outputs]; its bias and the norm's gain [outputs], or None."""

    linear: torch.Tensor
    bias: torch.Tensor | None
    gain: torch.Tensor | None


def fold(step: Step, weights: Weights, fitted: torch.Tensor, moment: torch.Tensor, factor: float) -> Weights:
    """The weights with a fit in them.

    Args:
        fitted: float64[inputs, outputs].
        moment: float64[inputs, inputs], the mean of x^T x over tokens, x the features of the step.
        factor: of the outlet.
    """
    linear, bias, gain = weights.linear, weights.bias, weights.gain
    if step.changes == "norm":
        assert gain is not None
        return Weights(linear, bias, gain * (1 + fitted.diagonal()))
    added, shift = (linear, bias) if gain is None else (linear * gain, None if bias is None else bias * gain)
    if step.reads == "inputs":
        wanted = reads = added + fitted
    else:
        reads = torch.eye(len(fitted), dtype=fitted.dtype, device=fitted.device) + fitted
        wanted, shift = added @ reads, None if shift is None else shift @ reads
    if gain is None:
        return Weights(wanted, shift, None)
    sizes = ((moment @ reads) * reads).sum(0).clamp(min=0).sqrt() / abs(factor)
    sizes = sizes.clamp(min=_LEAST_GAIN * float(sizes.mean()))
    return Weights(wanted / sizes, None if shift is None else shift / sizes, sizes)


def parameters(outlet: Outlet, *, bias: bool) -> Mapping[str, str]:
    """The parameters of an outlet by the field of `Weights`: paths below the layer."""
    named = {"linear": f"{outlet.linear}.weight"}
    if bias:
        named["bias"] = f"{outlet.linear}.bias"
    if outlet.norm is not None:
        named["gain"] = f"{outlet.norm}.weight"
    return named
