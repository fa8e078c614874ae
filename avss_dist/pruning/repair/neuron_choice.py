"""The choice of the neurons that an MLP has after a cut: its own, or neurons of removed layers in their place.

Let F be the values of a layer's own neurons and of those that it could borrow, W0 its last linear map with zeros for
the borrowed ones, and T what the MLP should add to the hidden states: what it adds, and what is missing after it.
``|T - F W|^2 + r |W - W0|^2`` is minimized over W, with the ridge r that is best on held-back tokens. Without neuron
j, the minimum grows by ``|W_j|^2 / [(F'F + rI)^-1]_jj``. The neurons for which this is largest stay, as many as the
layer has, and W is fitted to them again.

The growth is exact for one neuron at a time. Of two neurons that do the same, each seems to be useless, so they are
dropped in a few rounds where that is better on held-back tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import torch

from avss_dist.pruning.repair.fits import RIDGES, NormalEquations, RidgeFit, fit_ridge

MOST_ROUNDS = 3
"""Maximum number of rounds in which neurons are dropped."""
PRODUCT_BYTES = 5_000_000_000
"""Memory that the products of neurons may take. More neurons are compared in pieces.

It is a constant, and not a part of the free memory, so that a repair is the same on every machine."""
_MINIMUM_SPARE = 0.5
"""Borrowed neurons of a piece, at least, as a share of the neurons of the layer."""
_FORM = "full"


@dataclass(frozen=True, eq=False)
class NeuronFit:
    """Neurons that stay, and the fit to them.

    Attributes:
        columns: int64[number], their features, in ascending order.
        fit: fitted change of their weights. Its errors are those without and with this change, on held-back tokens.
    """

    columns: torch.Tensor
    fit: RidgeFit

    def features(self, number: int) -> torch.Tensor:
        """Return the features in the order of a layer's neurons, with borrowed ones in the places of dropped ones.

        Args:
            number: neurons of the layer, which are the first features.
        """
        own = self.columns[self.columns < number]
        is_replaced = torch.ones(number, dtype=torch.bool, device=own.device)
        is_replaced[own] = False
        others = self.columns[len(own) :]
        num_replaced = number - len(own)
        features = torch.arange(number, device=own.device)
        features[is_replaced] = others[:num_replaced]
        return torch.cat([features, others[num_replaced:]])


def spare_columns(neurons: int, outputs: int) -> int:
    """Return the number of borrowed neurons whose products fit into `PRODUCT_BYTES` beside those of a layer's own.

    Args:
        neurons: neurons of the layer.
        outputs: channels of the hidden states.
    """
    minimum = max(1, round(_MINIMUM_SPARE * neurons))
    most = neurons + minimum
    while NormalEquations.peak_bytes(most + minimum, outputs) <= PRODUCT_BYTES:
        most += minimum
    return most - neurons


def number_of_pieces(pool: int, spare: int) -> int:
    """Return the number of pieces in which the neurons of a pool are compared.

    Each piece but the first also holds the best neurons of the one before it, which are `kept_of_piece`.

    Args:
        pool: neurons that could be borrowed.
        spare: neurons of a piece, at most, see `spare_columns`.
    """
    return 1 + ceil(max(0, pool - spare) / (spare - kept_of_piece(spare)))


def kept_of_piece(spare: int) -> int:
    """Return the number of neurons of a piece that are compared with the next one."""
    return spare // 2


def restricted(sums: NormalEquations, columns: torch.Tensor, start: torch.Tensor) -> NormalEquations:
    """Return the sums of some features. What the others give becomes part of what is missing.

    Args:
        columns: int64[number], the features.
        start: float64[inputs, outputs], weights of all features; the target is what they leave missing.
    """
    is_dropped = start.any(1)
    is_dropped[columns] = False
    dropped = torch.where(is_dropped)[0]
    given = start[dropped]
    to_dropped = sums.gram[columns[:, None], dropped]
    among_dropped = sums.gram[dropped[:, None], dropped]
    added = 2 * (given * sums.cross[dropped]).sum() + (given * (among_dropped @ given)).sum()
    return NormalEquations(
        gram=sums.gram[columns[:, None], columns],
        cross=sums.cross[columns] + to_dropped @ given,
        target=sums.target + added,
        count=sums.count,
    )


def fit_columns(
    fitted: NormalEquations, held_back: NormalEquations, columns: torch.Tensor, start: torch.Tensor
) -> NeuronFit:
    """Fit the weights of some features, starting from those that they have.

    Args:
        columns, start: see `restricted`.
    """
    fit = fit_ridge(restricted(fitted, columns, start), restricted(held_back, columns, start), _FORM)
    return NeuronFit(columns, fit)


def removal_errors(fitted: NormalEquations, held_back: NormalEquations, start: torch.Tensor) -> torch.Tensor:
    """Return by how much the error grows without each feature, float64[inputs].

    Args:
        start: see `restricted`.
    """
    ridge = fit_ridge(fitted, held_back, _FORM).ridge
    return fitted.removal_errors(start, max(RIDGES) if ridge is None else ridge)


def choose_neurons(
    fitted: NormalEquations, held_back: NormalEquations, start: torch.Tensor, number: int, constants: int = 0
) -> NeuronFit:
    """Choose the neurons that stay, and fit their weights. They are the layer's own if these have the least error.

    Args:
        start: see `restricted`.
        number: number of neurons that stay, and of the layer's own, which are the first features.
        constants: number of features at the end that are no neurons, and stay.
    """
    own = torch.arange(len(start), device=start.device)
    own = torch.cat([own[:number], own[len(own) - constants :]])
    best = fit_columns(fitted, held_back, own, start)
    ridge = fit_ridge(fitted, held_back, _FORM).ridge
    if ridge is None:
        return best
    errors = fitted.removal_errors(start, ridge)
    for rounds in range(1, MOST_ROUNDS + 1):
        columns = _dropped_in_rounds(fitted, start, ridge, errors, number, constants, rounds)
        candidate = fit_columns(fitted, held_back, columns, start)
        if candidate.fit.ridge is not None and candidate.fit.after < best.fit.after:
            best = candidate
    return best


def _dropped_in_rounds(
    fitted: NormalEquations,
    start: torch.Tensor,
    ridge: float,
    errors: torch.Tensor,
    number: int,
    constants: int,
    rounds: int,
) -> torch.Tensor:
    """Return the features that stay if the others are dropped in several rounds, int64[number + constants].

    Args:
        errors: those of `removal_errors` with all features.
    """
    columns = torch.arange(len(errors), device=errors.device)
    for size in _sizes(len(errors) - constants, number, rounds):
        columns = columns[largest_errors(errors, size, constants)]
        if size > number:
            errors = restricted(fitted, columns, start).removal_errors(start[columns], ridge)
    return columns


def _sizes(total: int, number: int, rounds: int) -> Iterator[int]:
    """Yield the number of neurons that stay after each round. Every round drops the same share."""
    share = (number / total) ** (1 / rounds)
    for done in range(1, rounds):
        yield max(number, round(total * share**done))
    yield number


def largest_errors(errors: torch.Tensor, number: int, constants: int = 0) -> torch.Tensor:
    """Return the neurons with the largest errors and the constants behind all neurons, in ascending order."""
    neurons = len(errors) - constants
    chosen = errors[:neurons].topk(number).indices
    constant = torch.arange(neurons, len(errors), device=errors.device)
    return torch.cat([chosen.sort().values, constant])
