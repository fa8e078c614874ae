"""Allocation of a sparsity budget over the linear maps of a model, in numpy.

The budget is the mean of the maps' sparsities, weighted by their numbers of weights.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
MAX_SPARSITY = 0.99  # of a map


def knapsack(damage: Float64, levels: Float64, sizes: Float64, target: float) -> Float64:
    """Return the sparsity of each map, float64[maps], that minimizes the total damage at a target mean sparsity.

    The steps of each map's lower convex hull are taken in the order of damage per weight, the last one in part, which
    is optimal for the continuous problem (Dantzig, Operations Research 5, 1957).

    Args:
        damage: float64[maps, levels], damage of each map at each level; it is 0 at sparsity 0.
        levels: float64[levels], ascending sparsities above 0.
        sizes: float64[maps], numbers of weights.
        target: mean sparsity, weighted by size.
    """
    steps = []
    for number, row in enumerate(damage):
        corners = lower_hull(np.append(0.0, levels), np.append(0.0, row))
        for (s0, d0), (s1, d1) in pairwise(corners):
            steps.append(((d1 - d0) / ((s1 - s0) * sizes[number]), s0, number, s1))
    sparsities, remaining = np.zeros(len(sizes)), target * sizes.sum()
    for _, s0, number, s1 in sorted(steps):
        step = min((s1 - s0) * sizes[number], remaining)
        sparsities[number] = s0 + step / sizes[number]
        remaining -= step
        if remaining <= 0:
            break
    return sparsities


def lower_hull(x: Float64, y: Float64) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull of points with ascending x (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for point in zip(x.tolist(), y.tolist(), strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            if (x1 - x0) * (point[1] - y0) > (y1 - y0) * (point[0] - x0):
                break
            hull.pop()
        hull.append(point)
    return hull


def proportional(ratios: Float64, sizes: Float64, target: float, maximum: float = MAX_SPARSITY) -> Float64:
    """Return sparsities in proportion to ratios, float64[maps], at most ``maximum``, at a target mean sparsity.

    Sparsity above the maximum is redistributed over the other maps, in proportion, until none is left.
    """
    sparsities, full = np.zeros(len(sizes)), np.zeros(len(sizes), bool)
    while not full.all():
        remaining = target * sizes.sum() - maximum * sizes[full].sum()
        sparsities = np.where(full, maximum, ratios * remaining / (ratios * sizes)[~full].sum())
        over = ~full & (sparsities > maximum)
        if not over.any():
            break
        full |= over
    return sparsities


def interpolate_path(path: Float64, sizes: Float64, target: float) -> Float64:
    """Return the sparsity of each map of a block, float64[maps], at which a greedy path reaches a target.

    Args:
        path: float64[steps, maps], non-decreasing sparsities after each step.
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
    """Return the relative sparsity of each map from its power-law exponent, float64[maps].

    It is 1 - epsilon for the heaviest tail and 1 + epsilon for the lightest, linear in between (AlphaPruning, arXiv
    2410.10912, on which ActTail is assumed to build).
    """
    low, high = exponents.min(), exponents.max()
    if high == low:
        return np.ones_like(exponents)
    ratios: Float64 = (exponents - low) / (high - low) * 2 * epsilon + (1 - epsilon)
    return ratios
