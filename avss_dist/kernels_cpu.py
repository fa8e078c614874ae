"""The loops of the CPU kernels: compiled, one sequence ``x[tokens, units]`` a call, tokens outside the mask skipped.

A tensor arrives as float32, or as the uint16 patterns of bfloat16. Sums are float64, counts are integers, and no
result depends on how sequences are spread over threads.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from avss_dist.stats import HISTOGRAM_SHIFT

_I32 = ir.IntType(32)
_ABS32 = np.uint32(0x7FFFFFFF)
_INF32 = np.uint32(0x7F800000)
_SHIFT = np.uint32(HISTOGRAM_SHIFT)

_compiled = njit(nogil=True, cache=True, fastmath={"reassoc", "contract"}, error_model="numpy")


def _float_bits(builder: Any, element: Any) -> Any:
    """The float32 pattern (int32) of a float32, or of a bfloat16 given as its int16 pattern."""
    if isinstance(element.type, ir.IntType):
        return builder.shl(builder.zext(element, _I32), ir.Constant(_I32, 16))
    return builder.bitcast(element, _I32)


@intrinsic
def _value(typingctx: Any, element: Any) -> Any:
    """An element as float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = _float_bits(builder, arguments[0])
        return builder.fpext(builder.bitcast(bits, ir.FloatType()), ir.DoubleType())

    return types.float64(element), generate


@intrinsic
def _pattern(typingctx: Any, element: Any) -> Any:
    """An element's float32 pattern as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _float_bits(builder, arguments[0])

    return types.uint32(element), generate


@_compiled
def _is_finite(row: Any) -> bool:
    largest = np.uint32(0)
    for j in range(row.shape[0]):
        largest = max(largest, _pattern(row[j]) & _ABS32)
    return largest < _INF32


@_compiled
def count_patterns(x: Any, mask: Any, counts: Any) -> None:
    """Add how often each 16-bit pattern occurs. x: uint16[tokens, units]; mask: bool[tokens]; counts: int32[65536]."""
    for t in range(x.shape[0]):
        if mask[t]:
            row = x[t]
            for j in range(row.shape[0]):
                counts[row[j]] += 1


@_compiled
def count_float32(x: Any, mask: Any, limits: Any, histogram: Any, near_zero: Any, extremes: Any) -> Any:
    """Count and sum the elements of float32[tokens, units].

    Args:
        limits: uint32[k], pattern of the smallest float32 that is not below each threshold.
        histogram: int64[2048], added to; near_zero: int64[k], added to.
        extremes: float64[2], lowest and highest finite value so far, updated.

    Returns:
        (count, zeros, nonfinite, mean, m2), moments merged token by token (Chan).
    """
    count = zeros = nonfinite = 0
    mean = m2 = 0.0
    units = x.shape[1]
    for t in range(x.shape[0]):
        if not mask[t]:
            continue
        row = x[t]
        finite = 0
        total = 0.0
        for j in range(units):
            size = _pattern(row[j]) & _ABS32
            if size < _INF32:
                finite += 1
                total += _value(row[j])
                histogram[size >> _SHIFT] += 1
                if size == 0:
                    zeros += 1
        nonfinite += units - finite
        if finite == 0:
            continue
        center = total / finite
        spread = 0.0
        low, high = extremes[0], extremes[1]
        for j in range(units):
            if (_pattern(row[j]) & _ABS32) < _INF32:
                value = _value(row[j])
                spread += (value - center) ** 2
                low = min(low, value)
                high = max(high, value)
        extremes[0], extremes[1] = low, high
        for k in range(limits.shape[0]):
            below = 0
            for j in range(units):
                below += (_pattern(row[j]) & _ABS32) < limits[k]
            near_zero[k] += below
        merged = count + finite
        delta = center - mean
        mean += delta * finite / merged
        m2 += spread + delta * delta * (count * (finite / merged))
        count = merged
    return count, zeros, nonfinite, mean, m2


@_compiled
def sum_units(x: Any, mask: Any, sums: Any, squares: Any) -> tuple[int, int]:
    """Add each unit's values (and squares, unless ``squares`` is empty) over the tokens that are finite throughout.

    x: [tokens, units]; sums, squares: float64[units], or [0]. Returns (finite tokens, tokens).
    """
    tokens = finite = 0
    for t in range(x.shape[0]):
        if not mask[t]:
            continue
        tokens += 1
        row = x[t]
        if not _is_finite(row):
            continue
        finite += 1
        if squares.shape[0]:
            for j in range(row.shape[0]):
                value = _value(row[j])
                sums[j] += value
                squares[j] += value * value
        else:
            for j in range(row.shape[0]):
                sums[j] += _value(row[j])
    return finite, tokens


@_compiled
def compare_tokens(before: Any, after: Any, update: Any, mask: Any) -> Any:
    """Compare a block's input with its output, token by token; all three are [tokens, units].

    Returns:
        (angles, cosine_sum, angular_sum, relative_magnitude_sum, input_count, input_mean, input_m2): the sums are over
        the ``angles`` tokens that are finite and nonzero in input and output and whose update did not overflow, the
        moments over all that are finite in input and output.
    """
    angles = count = 0
    cosine_sum = angular_sum = relative_sum = mean = m2 = 0.0
    units = before.shape[1]
    for t in range(before.shape[0]):
        if not mask[t]:
            continue
        old, new, change = before[t], after[t], update[t]
        if not (_is_finite(old) and _is_finite(new)):
            continue
        total = dot = old_sq = new_sq = change_sq = 0.0
        for j in range(units):
            a, b, c = _value(old[j]), _value(new[j]), _value(change[j])
            total += a
            dot += a * b
            old_sq += a * a
            new_sq += b * b
            change_sq += c * c
        center = total / units
        spread = 0.0
        for j in range(units):
            spread += (_value(old[j]) - center) ** 2
        merged = count + units
        delta = center - mean
        mean += delta * units / merged
        m2 += spread + delta * delta * (count * (units / merged))
        count = merged
        if old_sq > 0 and new_sq > 0 and change_sq < math.inf:
            cosine = min(1.0, max(-1.0, dot / math.sqrt(old_sq * new_sq)))
            angles += 1
            cosine_sum += cosine
            angular_sum += math.acos(cosine) / math.pi
            relative_sum += math.sqrt(change_sq / old_sq)
    return angles, cosine_sum, angular_sum, relative_sum, count, mean, m2
