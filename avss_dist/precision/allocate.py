"""Choice of the number format of each linear map under a budget of bits, in numpy."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from avss_dist.sparsity.allocate import lower_hull

Float64 = NDArray[np.float64]
Choice = NDArray[np.int64]
"""int64[maps]; the index of the format of each map."""
ROUNDING_ERROR = 1e-9  # of a budget, relative to it


def least_damage(damage: Float64, bits: Float64, budget: float) -> Choice:
    """Return the formats that minimize the total damage within a budget, but for the last step.

    The steps of each map's lower convex hull of damage by bits are taken in the order of the damage that a bit
    prevents, which is optimal if the last step may be taken in part (the multiple-choice knapsack: Sinha and Zoltners,
    Operations Research 27, 1979). A step that has no room is skipped, with the later ones of its map.

    Args:
        damage: float64[maps, formats], damage of each map in each format.
        bits: float64[maps, formats], bits of each map in each format.
        budget: bits of all maps; at least those of the smallest formats.
    """
    steps = []
    for number, (row, sizes) in enumerate(zip(damage, bits, strict=True)):
        by_size = np.lexsort((row, sizes))  # of equal sizes, the least damage first
        order = [i for n, i in enumerate(by_size) if n == 0 or sizes[i] > sizes[by_size[n - 1]]]
        at = {float(sizes[i]): int(i) for i in order}
        for (b0, d0), (b1, d1) in pairwise(lower_hull(sizes[order], row[order])):
            if d1 < d0:
                steps.append(((d0 - d1) / (b1 - b0), number, at[b0], at[b1]))
    chosen = smallest(damage, bits)
    room = budget * (1 + ROUNDING_ERROR) - total(bits, chosen)
    for _, number, before, after in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        step = bits[number, after] - bits[number, before]
        if chosen[number] == before and step <= room:
            chosen[number] = after
            room -= step
    return chosen


def in_order(order: Iterable[int], damage: Float64, bits: Float64, budget: float) -> Choice:
    """Return formats for which maps are raised, one after the other, to the largest format that has room.

    Args:
        order: indices of the maps.
        damage, bits, budget: as for `least_damage`.
    """
    chosen = smallest(damage, bits)
    room = budget * (1 + ROUNDING_ERROR) - total(bits, chosen)
    for number in order:
        steps = bits[number] - bits[number, chosen[number]]
        fitting = np.flatnonzero(steps <= room)
        best = int(fitting[np.lexsort((damage[number, fitting], -steps[fitting]))[0]])
        room -= steps[best]
        chosen[number] = best
    return chosen


def same_format(bits: Float64, budget: float) -> Choice:
    """Return the largest format that all maps can have within a budget."""
    totals = bits.sum(axis=0)
    fitting = np.flatnonzero(totals <= budget * (1 + ROUNDING_ERROR))
    best = int(fitting[np.argmax(totals[fitting])])
    return np.full(len(bits), best, np.int64)


def smallest(damage: Float64, bits: Float64) -> Choice:
    """Return the format with the fewest bits for each map; of equal ones, that with the least damage."""
    return np.array([np.lexsort((row, sizes))[0] for row, sizes in zip(damage, bits, strict=True)], np.int64)


def total(values: Float64, chosen: Choice) -> float:
    """Return the sum over maps of the values, float64[maps, formats], of their formats."""
    return float(values[np.arange(len(values)), chosen].sum())
