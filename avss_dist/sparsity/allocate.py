"""How a budget of sparsity is spread over the linear maps of a model. Pure numpy.

A budget counts weights: the sparsities of maps, each weighted by its number of weights, average to it.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
MOST = 0.99  # sparsity of a map


def knapsack(damage: Float64, levels: Float64, sizes: Float64, target: float) -> Float64:
    """The sparsity of each map, float64[maps], with the least sum of damages whose mean by size is the target.

    The steps of each map's lower convex hull are taken in the order of damage for a weight, the last in part: the
    optimum of the continuous problem (Dantzig, Operations Research 5, 1957).

    Args:
        damage: float64[maps, levels], of each map at each level; 0 at sparsity 0.
        levels: float64[levels], sparsities, ascending, above 0.
        sizes: float64[maps], numbers of weights.
    """
    steps = []
    for number, row in enumerate(damage):
        corners = _lower_hull(np.append(0.0, levels), np.append(0.0, row))
        for (s0, d0), (s1, d1) in pairwise(corners):
            steps.append(((d1 - d0) / ((s1 - s0) * sizes[number]), s0, number, s1))
    found, left = np.zeros(len(sizes)), target * sizes.sum()
    for _, s0, number, s1 in sorted(steps):
        step = min((s1 - s0) * sizes[number], left)
        found[number] = s0 + step / sizes[number]
        left -= step
        if left <= 0:
            break
    return found


def _lower_hull(x: Float64, y: Float64) -> list[tuple[float, float]]:
    """The corners of the lower convex hull of points whose x ascend (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (point[1] - y0) > (y1 - y0) * (point[0] - x0):
                break
            hull.pop()
        hull.append(point)
    return hull


def scaled(ratios: Float64, sizes: Float64, target: float, most: float = MOST) -> Float64:
    """Sparsities in proportion to ratios, float64[maps], none above ``most``, whose mean by size is the target.

    What is cut off at ``most`` is given to the others, in proportion again, until nothing is.
    """
    found, full = np.zeros(len(sizes)), np.zeros(len(sizes), bool)
    while not full.all():
        left = target * sizes.sum() - most * sizes[full].sum()
        found = np.where(full, most, ratios * left / (ratios * sizes)[~full].sum())
        over = ~full & (found > most)
        if not over.any():
            break
        full |= over
    return found


def along_path(path: Float64, sizes: Float64, target: float) -> Float64:
    """The sparsity of each map of a block where a greedy path reaches a target, float64[maps].

    Args:
        path: float64[steps, maps], sparsities after each step, of which none falls.
        sizes: float64[maps], numbers of weights.
    """
    reached = path @ sizes / sizes.sum()
    at = int(np.searchsorted(reached, target))
    if at == 0 or at == len(reached):
        return path[min(at, len(path) - 1)]
    part = (target - reached[at - 1]) / (reached[at] - reached[at - 1])
    step: Float64 = path[at - 1] + part * (path[at] - path[at - 1])
    return step


def heavy_tail_ratios(exponents: Float64, epsilon: float = 0.3) -> Float64:
    """How much sparsity each map can bear, from its power-law exponent: 1 - epsilon the heaviest tail, 1 + epsilon the
    lightest (AlphaPruning, arXiv 2410.10912, which is read here as what ActTail does).
    """
    low, high = exponents.min(), exponents.max()
    if high == low:
        return np.ones_like(exponents)
    ratios: Float64 = (exponents - low) / (high - low) * 2 * epsilon + (1 - epsilon)
    return ratios
