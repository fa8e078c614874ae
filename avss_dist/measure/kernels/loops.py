"""Compiled loops of the CPU kernels. They process one sequence ``x[tokens, units]`` at a time and skip masked tokens.

A tensor arrives as float32, or as the uint16 patterns of bfloat16. Sums are float64, counts are integers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from avss_dist.measure.kernels.bits import pattern, value
from avss_dist.measure.kernels.compiling import compiled
from avss_dist.stats.histogram import CUT_SHIFT

_ABS32 = np.uint32(0x7FFFFFFF)
_INF32 = np.uint32(0x7F800000)
_SHIFT = np.uint32(CUT_SHIFT)

_compiled = compiled(fastmath={"reassoc", "contract"})


@_compiled
def _is_finite(row: Any) -> Any:
    largest = np.uint32(0)
    for j in range(row.shape[0]):
        largest = max(largest, pattern(row[j]) & _ABS32)
    return largest < _INF32


@_compiled
def measure_patterns(raw: Any, values: Any, mask: Any, counts: Any, summed: Any, comparison: Any) -> None:
    """Measure pattern counts and unit sums of the sequences of a 16-bit tensor. Compare them with a block's input.

    Args:
        raw: uint16[sequences, tokens, units], the bit patterns.
        values: the values to sum: ``raw`` for bfloat16, float32 for float16.
        mask: bool[sequences, tokens], true for tokens that count.
        counts: uint32[65536], added to.
        summed: sums, squares, tokens and pooled, one row per sequence. See `_sum_sequence`.
        comparison: whether there is an input to compare with, the input in the form of ``values``, angles and geometry,
            one row per sequence. See `_compare_sequence`.
    """
    sums, squares, tokens, pooled = summed
    compared, before, angles, geometry = comparison
    for b in range(raw.shape[0]):
        sums[b], squares[b] = 0.0, 0.0
        nonfinite = _count_nonfinite(counts, values)
        for t in range(raw.shape[1]):
            if mask[b, t]:
                _count_row(raw[b, t], counts)
        all_finite = _count_nonfinite(counts, values) == nonfinite
        _sum_sequence(values[b], mask[b], all_finite, sums[b], squares[b], tokens[b], pooled[b])
        if compared:
            _compare_sequence(before[b], values[b], mask[b], angles[b], geometry[b])


@_compiled
def _count_row(row: Any, counts: Any) -> None:
    for j in range(row.shape[0]):
        counts[row[j]] += 1


@_compiled
def measure_float32(
    x: Any, mask: Any, limits: Any, counts: Any, elementwise: Any, summed: Any, comparison: Any
) -> None:
    """Measure the sequences of a float32 tensor. Compare them with a block's input.

    Args:
        x: float32[sequences, tokens, units].
        mask: bool[sequences, tokens], true for tokens that count.
        limits: uint32[k], the pattern of the smallest float32 that is not below each threshold.
        counts: uint32[65536], added to, by the upper half of the pattern of abs(x).
        elementwise: near_zero, elements and moments, one row per sequence. See `_count_float32`.
        summed, comparison: as in `measure_patterns`.
    """
    near_zero, elements, moments = elementwise
    sums, squares, tokens, pooled = summed
    compared, before, angles, geometry = comparison
    for b in range(x.shape[0]):
        near_zero[b], sums[b], squares[b] = 0, 0.0, 0.0
        _count_float32(x[b], mask[b], limits, counts, near_zero[b], elements[b], moments[b])
        _sum_sequence(x[b], mask[b], elements[b, 2] == 0, sums[b], squares[b], tokens[b], pooled[b])
        if compared:
            _compare_sequence(before[b], x[b], mask[b], angles[b], geometry[b])


@_compiled
def _count_nonfinite(counts: Any, values: Any) -> int:
    """Return the number of NaN and infinite patterns, of bfloat16 if ``values`` are patterns, else of float16."""
    first = 0x7F80 if values.itemsize == 2 else 0x7C00
    total = 0
    for i in range(first, 0x8000):
        total += counts[i] + counts[i + 0x8000]
    return total


@_compiled
def _count_float32(x: Any, mask: Any, limits: Any, counts: Any, near_zero: Any, elements: Any, moments: Any) -> None:
    """Count and sum the elements of one sequence, float32[tokens, units].

    Added to or written: counts uint32[65536]; near_zero int64[k]; elements int64[3] (count, zeros, nonfinite); moments
    float64[4] (mean, m2, lowest, highest), merged token by token (Chan).
    """
    count = zeros = nonfinite = 0
    mean = m2 = 0.0
    low, high = np.inf, -np.inf
    units = x.shape[1]
    for t in range(x.shape[0]):
        if not mask[t]:
            continue
        row = x[t]
        finite = 0
        total = 0.0
        for j in range(units):
            size = pattern(row[j]) & _ABS32
            if size < _INF32:
                finite += 1
                total += value(row[j])
                counts[size >> _SHIFT] += 1
                if size == 0:
                    zeros += 1
        nonfinite += units - finite
        if finite == 0:
            continue
        center = total / finite
        spread = 0.0
        for j in range(units):
            if (pattern(row[j]) & _ABS32) < _INF32:
                x_j = value(row[j])
                spread += (x_j - center) ** 2
                low = min(low, x_j)
                high = max(high, x_j)
        for k in range(limits.shape[0]):
            below = 0
            for j in range(units):
                below += (pattern(row[j]) & _ABS32) < limits[k]
            near_zero[k] += below
        merged = count + finite
        delta = center - mean
        mean += delta * (finite / merged)
        m2 += spread + delta * delta * (count * (finite / merged))
        count = merged
    elements[0], elements[1], elements[2] = count, zeros, nonfinite
    moments[0], moments[1], moments[2], moments[3] = mean, m2, low, high


@_compiled
def _sum_sequence(x: Any, mask: Any, all_finite: bool, sums: Any, squares: Any, tokens: Any, pooled: Any) -> None:
    """Sum one sequence, [tokens, units], over the tokens that are finite throughout (all of them if ``all_finite``).

    Added to: sums and squares, float64[units]. If squares is empty, it is skipped. Written: tokens int64[2] (finite,
    all); pooled float64[1], the unbiased variance over units of the mean over tokens, NaN unless all are finite.
    """
    finite = seen = 0
    for t in range(x.shape[0]):
        if not mask[t]:
            continue
        seen += 1
        row = x[t]
        if not (all_finite or _is_finite(row)):
            continue
        finite += 1
        if squares.shape[0]:
            for j in range(row.shape[0]):
                x_j = value(row[j])
                sums[j] += x_j
                squares[j] += x_j * x_j
        else:
            for j in range(row.shape[0]):
                sums[j] += value(row[j])
    tokens[0], tokens[1] = finite, seen
    pooled[0] = _variance(sums, finite) if finite and finite == seen else np.nan


@_compiled
def _variance(sums: Any, tokens: int) -> float:
    """Return the unbiased variance of ``sums / tokens`` in two passes, 0 for a single unit."""
    units = sums.shape[0]
    if units < 2:
        return 0.0
    total = 0.0
    for j in range(units):
        total += sums[j]
    center = total / units
    spread = 0.0
    for j in range(units):
        spread += ((sums[j] - center) / tokens) ** 2
    return spread / (units - 1)


@_compiled
def _compare_sequence(before: Any, after: Any, mask: Any, counts: Any, sums: Any) -> None:
    """Compare one sequence of a block's input with its output, [tokens, units], token by token.

    Written: counts int64[2], the tokens that are finite and nonzero in input and output, and the input elements of
    tokens that are finite in both; sums float64[5]: over the former cos(in, out), acos(cos) / pi and |out - in| / |in|,
    of the latter mean and m2. The difference is taken between the float64 values, before rounding to the dtype.
    """
    angles = count = 0
    cosine_sum = angular_sum = relative_sum = mean = m2 = 0.0
    units = before.shape[1]
    for t in range(before.shape[0]):
        if not mask[t]:
            continue
        old, new = before[t], after[t]
        total = dot = old_sq = new_sq = change_sq = 0.0
        for j in range(units):
            a, b = value(old[j]), value(new[j])
            total += a
            dot += a * b
            old_sq += a * a
            new_sq += b * b
            change_sq += (b - a) * (b - a)
        if not (old_sq < math.inf and new_sq < math.inf):  # float64 sums of float32 squares do not overflow
            continue
        center = total / units
        spread = 0.0
        for j in range(units):
            spread += (value(old[j]) - center) ** 2
        merged = count + units
        delta = center - mean
        mean += delta * (units / merged)
        m2 += spread + delta * delta * (count * (units / merged))
        count = merged
        if old_sq > 0 and new_sq > 0:
            cosine = min(1.0, max(-1.0, dot / math.sqrt(old_sq * new_sq)))
            angles += 1
            cosine_sum += cosine
            angular_sum += math.acos(cosine) / math.pi
            relative_sum += math.sqrt(change_sq / old_sq)
    counts[0], counts[1] = angles, count
    sums[0], sums[1], sums[2], sums[3], sums[4] = cosine_sum, angular_sum, relative_sum, mean, m2
