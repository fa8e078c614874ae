"""Change points of a sequence of vectors: where its mean changes. Pure numpy."""

from __future__ import annotations

import numpy as np

from avss_dist.stats.layer_stats import Float64

MIN_SEGMENT = 2  # points on each side of a change
LEVEL = 0.05
PERMUTATIONS = 999
_BLOCK_NUMBERS = 4_000_000  # of the permuted sequences that are in memory at once


def change_points(sequence: Float64, *, level: float = LEVEL, permutations: int = PERMUTATIONS) -> list[int]:
    """Return the indices at which a new segment of a sequence begins, ascending.

    Binary segmentation (Scott and Knott, Biometrics 30, 1974): the sequence is split where this lowers the sum of
    squared distances from the means of the segments most, and each part is split again. A split counts if, of random
    orders of the same vectors, at most the share ``level`` has a split that lowers it as much. Fewer than eight points
    can hardly show one: half of their orders are then too few.

    Args:
        sequence: float64[points, n], finite.
        level: level of the test of each split.
        permutations: number of random orders, always the same ones.
    """
    splits: list[int] = []
    parts = [(0, len(sequence))]
    while parts:
        start, end = parts.pop()
        split = _split(sequence[start:end], level, permutations)
        if split is not None:
            splits.append(start + split)
            parts += [(start, start + split), (start + split, end)]
    return sorted(splits)


def _split(part: Float64, level: float, permutations: int) -> int | None:
    """Return the index of the best split of a part, or None if random orders are split as well."""
    number = len(part)
    if number < 2 * MIN_SEGMENT:
        return None
    centered = part - part.mean(axis=0)
    gains = _gains(centered[None])[0]
    best = int(gains.argmax())
    if gains[best] <= 0:
        return None
    random = np.random.default_rng(0)
    least = gains[best] * (1 - 1e-9)  # the same groups in another order are as good, but for rounding
    step, as_good = max(1, _BLOCK_NUMBERS // centered.size), 0
    for start in range(0, permutations, step):
        orders = np.argsort(random.random((min(step, permutations - start), number)), axis=1)
        as_good += int((_gains(centered[orders]).max(axis=1) >= least).sum())
    return best + MIN_SEGMENT if (as_good + 1) / (permutations + 1) <= level else None


def _gains(sequences: Float64) -> Float64:
    """Return by how much each split lowers the sum of squares, float64[sequences, splits].

    Args:
        sequences: float64[sequences, points, n], each with a mean of zero. The first split is after `MIN_SEGMENT`
            points.
    """
    number = sequences.shape[1]
    sizes = np.arange(1, number)
    gains: Float64 = (sequences.cumsum(axis=1)[:, :-1] ** 2).sum(axis=2) * number / (sizes * (number - sizes))
    return gains[:, MIN_SEGMENT - 1 : number - MIN_SEGMENT]
