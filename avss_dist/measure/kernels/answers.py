"""Compiled loops for the statistics of single rows on a CPU, in float64, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

from avss_dist.measure.kernels.compiling import compiled

_compiled = compiled(fastmath={"reassoc", "contract"})


@_compiled
def measure_answers(values: Any, before: Any, row: Any, thresholds: Any, counts: Any, sums: Any, centers: Any) -> None:
    """Add the statistics of tokens to those of their rows. All outputs must be zero at first.

    Args:
        values: float32[tokens, units].
        before: input of a block, of the shape of ``values``, or empty, float32[0, units].
        row: int64[tokens], the row of each token.
        thresholds: float64[k].
        counts: int64[rows, 1 + k], output: finite elements, and elements with abs(x) below each threshold.
        sums: float64[rows, 4], output: sums of elements, of their squared distances from the row's mean, of the tokens'
            norms and of their relative updates. The first two leave out non-finite elements, which make the others NaN
            or infinite.
        centers: float64[rows, units], output: sums of elements by unit, NaN or infinite if an element is.
    """
    for t in range(values.shape[0]):
        r, squares = row[t], 0.0
        for j in range(values.shape[1]):
            squares += np.float64(values[t, j]) * np.float64(values[t, j])
        for j in range(values.shape[1]):
            centers[r, j] += np.float64(values[t, j])
        for i in range(thresholds.shape[0]):
            near = 0
            for j in range(values.shape[1]):
                near += np.float64(abs(values[t, j])) < thresholds[i]
            counts[r, 1 + i] += near
        finite, total = _finite_sum(values[t], np.isfinite(squares))
        counts[r, 0] += finite
        sums[r, 0] += total
        sums[r, 2] += np.sqrt(squares)
        if before.shape[0]:
            sums[r, 3] += _relative_update(before[t], values[t])
    for t in range(values.shape[0]):
        r = row[t]
        if counts[r, 0]:
            sums[r, 1] += _squared_distances(values[t], sums[r, 0] / counts[r, 0])


@_compiled
def _finite_sum(token: Any, is_finite: Any) -> Any:
    """Return the number of finite elements of a token, and their sum."""
    total = 0.0
    if is_finite:
        for j in range(token.shape[0]):
            total += np.float64(token[j])
        return token.shape[0], total
    finite = 0
    for j in range(token.shape[0]):
        if np.isfinite(token[j]):
            finite += 1
            total += np.float64(token[j])
    return finite, total


@_compiled
def _squared_distances(token: Any, mean: Any) -> Any:
    total = 0.0
    for j in range(token.shape[0]):
        distance = np.float64(token[j]) - mean
        total += distance * distance
    if np.isfinite(total):
        return total
    total = 0.0
    for j in range(token.shape[0]):
        if np.isfinite(token[j]):
            distance = np.float64(token[j]) - mean
            total += distance * distance
    return total


@_compiled
def _relative_update(before: Any, after: Any) -> Any:
    change, size = 0.0, 0.0
    for j in range(before.shape[0]):
        step = np.float64(after[j]) - np.float64(before[j])
        change += step * step
        size += np.float64(before[j]) * np.float64(before[j])
    return np.sqrt(change) / np.sqrt(size)
