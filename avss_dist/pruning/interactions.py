"""The set of layers with the least predicted loss, from the interactions of layers.

To second order, the loss rises by ``b^T x + 1/2 x^T H x`` without the layers where ``x`` is 1: ``b`` is the effect of
each layer alone, and ``H`` that of pairs (with the Fisher information for the curvature: Michel, Levy and Neubig, arXiv
1905.10650, for gates; Hassibi and Stork, 1992, for the second order).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

from avss_dist.pruning.selection import PlanError
from avss_dist.stats.layer_stats import Float64

MAXIMUM_SETS = 200_000_000  # maximum for an exhaustive search: 15 of 30 layers, in seconds
RESTARTS = 64  # of the local search among more sets
AT_ONCE = 1 << 22  # sets with values in memory


def quadratic(b: Float64, h: Float64, count: int, first: int = 0, last: int = 0) -> tuple[int, ...]:
    """Return the ``count`` layers without which the predicted loss is least, ascending.

    The search is exhaustive for up to `MAXIMUM_SETS` sets. For more, `RESTARTS` seeded local searches are compared.

    Args:
        b: float64[layers], nats per token.
        h: float64[layers, layers]; only its symmetric part counts.
        first, last: number of layers at the ends that are protected.

    Raises:
        PlanError: values are not finite or of other shapes, or fewer than ``count`` layers are unprotected.
    """
    n = len(b)
    if b.shape != (n,) or h.shape != (n, n) or not (np.isfinite(b).all() and np.isfinite(h).all()):
        raise PlanError(
            f"Interactions are finite numbers, one for each layer and each pair; here are {b.shape} and {h.shape}.",
            "Measure them again.",
        )
    free = range(first, max(first, n - last))
    if not 0 < count <= len(free) or count == n:
        raise PlanError(f"{count} of {n} layers cannot be dropped: {len(free)} are not protected.", "Drop fewer.")
    b, h = b[free], ((h + h.T) / 2)[np.ix_(free, free)]
    linear, pairs = b + np.diag(h) / 2, h - np.diag(np.diag(h))
    exact = comb(len(free), count) <= MAXIMUM_SETS
    chosen = _search_all(linear, pairs, count) if exact else _search_locally(linear, pairs, count)
    return tuple(first + layer for layer in sorted(chosen))


def predicted(b: Float64, h: Float64, layers: Sequence[int]) -> float:
    """Return the predicted increase of the loss without some layers, in nats per token."""
    x = np.zeros(len(b))
    x[[*layers]] = 1.0
    return float(b @ x + x @ h @ x / 2)


def _search_all(linear: Float64, pairs: Float64, count: int) -> Sequence[int]:
    """Compare all sets, each a set of the first half of the layers and one of the second, by matrix products."""
    half = len(linear) // 2
    best, chosen = np.inf, np.zeros(0, np.intp)
    for size in range(max(0, count - len(linear) + half), min(half, count) + 1):
        first = _subsets(range(half), size, len(linear))
        second = _subsets(range(half, len(linear)), count - size, len(linear))
        alone, across = _values(second, linear, pairs), pairs @ second.T
        step = max(1, AT_ONCE // len(second))
        for start in range(0, len(first), step):
            chunk = first[start : start + step]
            values = _values(chunk, linear, pairs)[:, None] + alone + chunk @ across
            if (lowest := values.min()) < best:
                best = lowest
                i, j = np.unravel_index(values.argmin(), values.shape)
                chosen = np.flatnonzero(chunk[i] + second[j])
    return chosen.tolist()


def _subsets(layer_range: range, size: int, layers: int) -> Float64:
    """Return all subsets in lexicographic order, float64[subsets, layers], 1 where a layer is in the subset."""
    chosen = np.array(list(combinations(layer_range, size)), np.intp).reshape(comb(len(layer_range), size), size)
    subsets = np.zeros((len(chosen), layers))
    np.put_along_axis(subsets, chosen, 1.0, axis=1)
    return subsets


def _values(sets: Float64, linear: Float64, pairs: Float64) -> Float64:
    """Return the predicted losses of sets, float64[sets]."""
    values: Float64 = sets @ linear + ((sets @ pairs) * sets).sum(axis=1) / 2
    return values


def _search_locally(linear: Float64, pairs: Float64, count: int) -> Sequence[int]:
    """Make the best swap as long as one helps, from the layers with the least effects alone and from random sets."""
    rng = np.random.default_rng(0)
    alone = np.argsort(linear, kind="stable")
    starts = [alone[:count], *(rng.permutation(len(linear))[:count] for _ in range(RESTARTS))]
    ends = [_descend(start, linear, pairs) for start in starts]
    chosen = ends[int(np.argmin(_values(np.array(ends, np.float64), linear, pairs)))]
    return np.flatnonzero(chosen).tolist()


def _descend(start: NDArray[np.intp], linear: Float64, pairs: Float64) -> NDArray[np.bool_]:
    chosen = np.zeros(len(linear), np.bool_)
    chosen[start] = True
    while True:
        cost = linear + pairs @ chosen  # effect of a layer beside the others in the set
        inside, outside = np.flatnonzero(chosen), np.flatnonzero(~chosen)
        if not len(outside):
            return chosen
        change = cost[outside] - cost[inside][:, None] - pairs[np.ix_(inside, outside)]
        i, j = np.unravel_index(change.argmin(), change.shape)
        if change[i, j] > -1e-12 * np.abs(cost).max():  # smaller changes are rounding
            return chosen
        chosen[inside[i]], chosen[outside[j]] = False, True
