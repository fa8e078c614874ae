"""Allocation of a budget over the linear maps of a model, in numpy: sparsity, or bits of number formats.

A sparsity is the mean of the maps' sparsities, weighted by their numbers of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from avss_dist.stats.layer_stats import Float64

FormatIndices = NDArray[np.int64]
"""int64[maps]; the index of the format of each map."""
MAX_SPARSITY = 0.99
"""Largest sparsity of a map."""
ROUNDING_ERROR = 1e-9
"""Excess over a budget that is taken for an error of rounding, relative to the budget."""


class _SparsityStep(NamedTuple):
    """A step along the lower convex hull of a map's damage by sparsity. Steps are sorted by their slopes."""

    slope: float
    """Damage for each weight that meets a zero."""
    start: float
    """Sparsity before the step."""
    number: int
    """Index of the map."""
    end: float
    """Sparsity after the step."""


class _FormatStep(NamedTuple):
    """A step along the lower convex hull of a map's damage by bits. Steps are sorted by their slopes."""

    slope: float
    """Change of the damage for each added bit, below 0."""
    number: int
    """Index of the map."""
    smaller: int
    """Index of the format before the step."""
    larger: int
    """Index of the format after the step."""


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
            slope = (d1 - d0) / ((s1 - s0) * sizes[number])
            steps.append(_SparsityStep(slope, start=s0, number=number, end=s1))
    sparsities = np.zeros(len(sizes))
    remaining = target * sizes.sum()
    for step in sorted(steps):
        size = sizes[step.number]
        zeros = min((step.end - step.start) * size, remaining)
        sparsities[step.number] = step.start + zeros / size
        remaining -= zeros
        if remaining <= 0:
            break
    return sparsities


def lower_hull(x: Float64, y: Float64) -> list[tuple[float, float]]:
    """Return the corners of the lower convex hull of points with ascending x (Andrew's monotone chain)."""
    hull: list[tuple[float, float]] = []
    for x2, y2 in zip(x.tolist(), y.tolist(), strict=True):
        while len(hull) > 1:
            (x0, y0), (x1, y1) = hull[-2:]
            # The last corner stays if it lies below the line from the one before it to the point.
            if (x1 - x0) * (y2 - y0) > (y1 - y0) * (x2 - x0):
                break
            hull.pop()
        hull.append((x2, y2))
    return hull


def proportional(ratios: Float64, sizes: Float64, target: float, maximum: float = MAX_SPARSITY) -> Float64:
    """Return sparsities in proportion to ratios, float64[maps], at most ``maximum``, at a target mean sparsity.

    Sparsity above the maximum is redistributed over the other maps, in proportion, until none is left.
    """
    sparsities = np.zeros(len(sizes))
    full = np.zeros(len(sizes), bool)
    while not full.all():
        remaining = target * sizes.sum() - maximum * sizes[full].sum()
        shares = ratios * remaining / (ratios * sizes)[~full].sum()
        sparsities = np.where(full, maximum, shares)
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
    step = int(np.searchsorted(reached, target))
    if step == 0:
        return path[0]
    if step == len(reached):
        return path[-1]
    part = (target - reached[step - 1]) / (reached[step] - reached[step - 1])
    return np.asarray(path[step - 1] + part * (path[step] - path[step - 1]))


def heavy_tail_ratios(exponents: Float64, epsilon: float = 0.3) -> Float64:
    """Return the relative sparsity of each map from its power-law exponent, float64[maps].

    It is 1 - epsilon for the heaviest tail and 1 + epsilon for the lightest, linear in between (AlphaPruning, arXiv
    2410.10912, on which ActTail is assumed to build).
    """
    low = exponents.min()
    high = exponents.max()
    if high == low:
        return np.ones_like(exponents)
    places = (exponents - low) / (high - low)  # 0 for the heaviest tail, 1 for the lightest
    return np.asarray(places * 2 * epsilon + (1 - epsilon))


def least_damage(damage: Float64, bits: Float64, budget: float) -> FormatIndices:
    """Return the formats that minimize the total damage within a budget, but for the last step.

    The steps of each map's lower convex hull of damage by bits are taken in the order of the damage that a bit
    prevents, which is optimal if the last step may be taken in part (the multiple-choice knapsack: Sinha and Zoltners,
    Operations Research 27, 1979). A step that has no room is skipped, with the later ones of its map.

    Args:
        damage: float64[maps, formats], damage of each map in each format.
        bits: float64[maps, formats], bits of each map in each format.
        budget: bits of all maps; at least those of the smallest formats.
    """
    steps: list[_FormatStep] = []
    for number, (row, sizes) in enumerate(zip(damage, bits, strict=True)):
        steps += _steps_to_larger_formats(number, row, sizes)
    chosen = smallest(damage, bits)
    room = budget * (1 + ROUNDING_ERROR) - total(bits, chosen)
    for step in sorted(steps):
        added = bits[step.number, step.larger] - bits[step.number, step.smaller]
        if chosen[step.number] == step.smaller and added <= room:
            chosen[step.number] = step.larger
            room -= added
    return chosen


def _steps_to_larger_formats(number: int, damage: Float64, bits: Float64) -> Iterator[_FormatStep]:
    """Yield the steps of one map's lower convex hull that lower its damage.

    Args:
        number: index of the map.
        damage, bits: float64[formats], of the map in each format.
    """
    # Of formats with equal bits, the one of least damage comes first, and is taken.
    formats: dict[float, int] = {}
    for index in np.lexsort((damage, bits)).tolist():
        formats.setdefault(float(bits[index]), index)
    candidates = list(formats.values())
    for (b0, d0), (b1, d1) in pairwise(lower_hull(bits[candidates], damage[candidates])):
        if d1 < d0:
            slope = -((d0 - d1) / (b1 - b0))
            yield _FormatStep(slope, number, smaller=formats[b0], larger=formats[b1])


def in_order(order: Iterable[int], damage: Float64, bits: Float64, budget: float) -> FormatIndices:
    """Return formats for which maps are raised, one after the other, to the largest format that has room.

    Args:
        order: indices of the maps.
        damage, bits, budget: as for `least_damage`.
    """
    chosen = smallest(damage, bits)
    room = budget * (1 + ROUNDING_ERROR) - total(bits, chosen)
    for number in order:
        added = bits[number] - bits[number, chosen[number]]
        fitting = np.flatnonzero(added <= room)
        largest_first = np.lexsort((damage[number, fitting], -added[fitting]))
        best = int(fitting[largest_first[0]])
        room -= added[best]
        chosen[number] = best
    return chosen


def same_format(bits: Float64, budget: float) -> FormatIndices:
    """Return the largest format that all maps can have within a budget."""
    totals = bits.sum(axis=0)
    fitting = np.flatnonzero(totals <= budget * (1 + ROUNDING_ERROR))
    largest = int(fitting[np.argmax(totals[fitting])])
    return np.full(len(bits), largest, np.int64)


def smallest(damage: Float64, bits: Float64) -> FormatIndices:
    """Return the format with the fewest bits for each map, and of equal ones that with the least damage."""
    formats = [np.lexsort((row, sizes))[0] for row, sizes in zip(damage, bits, strict=True)]
    return np.array(formats, np.int64)


def total(values: Float64, chosen: FormatIndices) -> float:
    """Return the sum over maps of the values, float64[maps, formats], of their formats."""
    return float(values[np.arange(len(values)), chosen].sum())
