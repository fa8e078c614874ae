"""CPU kernels: compiled loops in the calling thread, with sums in a fixed order.

Concurrent shards, each in a thread of its own, use more cores, since the loops release Python's lock. The loops process
one sequence ``x[tokens, units]`` at a time, skip masked tokens, and add each sequence to the accumulator at its end. A
tensor arrives as float32, or as the uint16 patterns of bfloat16. Sums are float64, counts are integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload

from avss_dist.measure.kernels.reference import Accumulator, Kernels, Tensors, limits_on
from avss_dist.stats.layer_stats import CUT_SHIFT

if TYPE_CHECKING:
    from numba.core.dispatcher import Dispatcher

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(*, fastmath: bool | set[str] = False) -> Callable[[Function], Dispatcher[Function]]:
    """Return a decorator that compiles a function with numba, without Python's lock.

    The compiled code is cached beside the module or in the user's cache. If neither can be written, each process
    compiles for itself, which takes some seconds.
    """

    def compile_(function: Function) -> Dispatcher[Function]:
        try:
            return njit(nogil=True, cache=True, error_model="numpy", fastmath=fastmath)(function)
        except RuntimeError:  # numba: no locator available
            return njit(nogil=True, error_model="numpy", fastmath=fastmath)(function)

    return compile_


# Without `fastmath`, numba gives a function the option of its caller.
_exact = compiled(fastmath=False)
_compiled = compiled(fastmath={"reassoc", "contract"})

Arrays = tuple[np.ndarray, ...]
"""Arrays that a compiled loop adds to."""
_ABS32 = np.uint32(0x7FFFFFFF)
_INF32 = np.uint32(0x7F800000)


class CpuKernels(Kernels):
    """CPU backend, see `kernels.reference.Kernels`."""

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """Add the statistics of a batch to an accumulator, as `kernels.reference.Kernels.add`."""
        into.reserve(x.numel())
        by_sequence = _named(into.tensors, _BY_SEQUENCE)
        elements: Arrays = ()
        if x.dtype == torch.float32:
            elements = _named(into.tensors, _ELEMENTS)
        else:
            counts = into.tensors["patterns"].numpy()
        compared: Arrays = ()
        if before is not None:
            compared = _named(into.tensors, _COMPARED)
        limits = limits_on(into.thresholds.tobytes(), x.device).numpy().view(np.uint32)
        masks = mask.contiguous().numpy()
        all_inputs = x if before is None else before
        for sequence, counted, inputs in zip(x, masks, all_inputs, strict=True):
            values = _as_loops_read(sequence)
            if x.dtype == torch.float32:
                count_float32(values, counted, limits, elements)
            elif x.dtype == torch.bfloat16:
                count_patterns(values, counted, counts)
            else:
                count_patterns(_patterns(sequence), counted, counts)
            sum_sequence(values, counted, by_sequence)
            if before is not None:
                compare_sequence(_as_loops_read(inputs), values, counted, compared)


_ELEMENTS = ("cuts", "near_zero", "elements", "moments", "extremes")
_BY_SEQUENCE = ("sequences", "pooled", "unit_count", "unit_sums")
_COMPARED = ("tokens", "geometry", "input_moments")
_ABSENT = {"unit_count": np.zeros(1, np.int64), "unit_sums": np.zeros((2, 0))}


def _named(tensors: Tensors, names: Sequence[str]) -> Arrays:
    """Return some tensors of an accumulator as compiled loops take them."""
    arrays = []
    for name in names:
        if name in tensors:
            arrays.append(tensors[name].numpy())
        else:
            arrays.append(_ABSENT[name])
    return tuple(arrays)


def _patterns(x: torch.Tensor) -> np.ndarray:
    """Return the bits of a 16-bit tensor, uint16."""
    return _array(x.view(torch.int16)).view(np.uint16)


def _as_loops_read(x: torch.Tensor) -> np.ndarray:
    """Return a tensor as the loops read it: bfloat16 as uint16 patterns, float32 unchanged, float16 as float32."""
    if x.dtype == torch.bfloat16:
        return _patterns(x)
    return _array(x.float())


def _array(x: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as an array. `torch.Tensor.numpy` would keep streaming from freeing the memory."""
    return np.from_dlpack(x)


def value(element: float) -> float:
    """Return the value of an element as float64. Only callable from compiled code."""
    raise NotImplementedError


def pattern(element: float) -> np.uint32:
    """Return the float32 pattern of an element. Only callable from compiled code."""
    raise NotImplementedError


@overload(value, strict=False)
def _value(element: types.Type) -> Callable[[float], float]:
    if isinstance(element, types.Float):
        return lambda element: np.float64(element)
    return lambda element: np.float64(np.uint32(np.uint32(element) << 16).view(np.float32))


@overload(pattern, strict=False)
def _pattern(element: types.Type) -> Callable[[float], np.uint32]:
    if isinstance(element, types.Float):
        return lambda element: np.float32(element).view(np.uint32)
    return lambda element: np.uint32(np.uint32(element) << 16)


@_exact
def _add_to(total: np.ndarray, added: np.ndarray | tuple[float, ...]) -> None:
    """Add float64 values to those of an accumulator, without the freedom to reorder sums that the loops have."""
    for i in range(len(added)):
        total[i] += added[i]


@_exact
def _merge_moments(total: np.ndarray, earlier: int, count: int, mean: float, m2: float) -> None:
    """Update ``total`` [mean, m2] of ``earlier`` elements by ``count`` more (Chan)."""
    if count:
        delta = mean - total[0]
        total[0] += delta * (count / (earlier + count))
        total[1] += m2 + delta * delta * (earlier * (count / (earlier + count)))


@_compiled
def count_patterns(raw: np.ndarray, mask: np.ndarray, counts: np.ndarray) -> None:
    """Count the patterns of one sequence, uint16[tokens, units], where ``mask`` is true.

    Added to: counts int32[65536] or int64[65536].
    """
    for t in range(raw.shape[0]):
        if mask[t]:
            for j in range(raw.shape[1]):
                counts[raw[t, j]] += 1


@_compiled
def count_float32(x: np.ndarray, mask: np.ndarray, limits: np.ndarray, totals: Arrays) -> None:
    """Count and sum the elements of one sequence, float32[tokens, units].

    Args:
        limits: uint32[k], the pattern of the smallest float32 that is not below each threshold.

    Added to: cuts int64[32768], by the upper half of the pattern of abs(x); near_zero int64[k]; elements int64[3]
    (count, zeros, nonfinite); moments float64[2] (mean, m2), merged token by token (Chan); extremes float64[2].
    """
    cuts, near_zero, elements, moments, extremes = totals
    count = zeros = nonfinite = 0
    mean = m2 = 0.0
    low = np.inf
    high = -np.inf
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
                cuts[size >> np.uint32(CUT_SHIFT)] += 1
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
    _merge_moments(moments, elements[0], count, mean, m2)
    elements[0] += count
    elements[1] += zeros
    elements[2] += nonfinite
    extremes[0] = min(extremes[0], low)
    extremes[1] = max(extremes[1], high)


@_compiled
def _is_finite(row: np.ndarray) -> np.bool:
    largest = np.uint32(0)
    for j in range(row.shape[0]):
        largest = max(largest, pattern(row[j]) & _ABS32)
    return largest < _INF32


@_compiled
def sum_sequence(x: np.ndarray, mask: np.ndarray, totals: Arrays) -> None:
    """Sum one sequence, [tokens, units], over the tokens that are finite throughout.

    Added to: pooled float64[1], the unbiased variance over units of the mean over tokens, with sequences int64[1], if
    all tokens are finite; unit_count int64[1], finite tokens; unit_sums float64[2, units], skipped if it has no units.
    """
    sequences, pooled, unit_count, unit_sums = totals
    sums = np.zeros(x.shape[1])
    squares = np.zeros(x.shape[1])
    finite = tokens = 0
    for t in range(x.shape[0]):
        if not mask[t]:
            continue
        tokens += 1
        row = x[t]
        if not _is_finite(row):
            continue
        finite += 1
        for j in range(row.shape[0]):
            x_j = value(row[j])
            sums[j] += x_j
            squares[j] += x_j * x_j
    if finite and finite == tokens:
        sequences[0] += 1
        _add_to(pooled, (_variance(sums, finite),))
    if unit_sums.shape[1]:
        unit_count[0] += finite
        _add_to(unit_sums[0], sums)
        _add_to(unit_sums[1], squares)


@_compiled
def _variance(sums: np.ndarray, tokens: int) -> float:
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
def compare_sequence(before: np.ndarray, after: np.ndarray, mask: np.ndarray, totals: Arrays) -> None:
    """Compare one sequence of a block's input with its output, [tokens, units], token by token.

    Added to: tokens int64[2], the tokens that are finite and nonzero in input and output, and the input elements of
    tokens that are finite in both; geometry float64[3], over the former cos(in, out), acos(cos) / pi and
    |out - in| / |in|; input_moments float64[2], mean and m2 of the latter. The difference is taken between the float64
    values, before rounding to the dtype.
    """
    tokens, geometry, input_moments = totals
    angles = count = 0
    cosine_sum = angular_sum = relative_sum = mean = m2 = 0.0
    units = before.shape[1]
    for t in range(before.shape[0]):
        if not mask[t]:
            continue
        old = before[t]
        new = after[t]
        total = dot = old_sq = new_sq = change_sq = 0.0
        for j in range(units):
            a = value(old[j])
            b = value(new[j])
            total += a
            dot += a * b
            old_sq += a * a
            new_sq += b * b
            change_sq += (b - a) * (b - a)
        # Float64 sums of float32 squares do not overflow, so that others are infinite or NaN.
        if not (old_sq < math.inf and new_sq < math.inf):
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
    _add_to(geometry, (cosine_sum, angular_sum, relative_sum))
    _merge_moments(input_moments, tokens[1], count, mean, m2)
    tokens[0] += angles
    tokens[1] += count


@_compiled
def measure_answers(
    values: np.ndarray,
    before: np.ndarray,
    row: np.ndarray,
    thresholds: np.ndarray,
    counts: np.ndarray,
    sums: np.ndarray,
    centers: np.ndarray,
) -> None:
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
        r = row[t]
        squares = 0.0
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
def _finite_sum(token: np.ndarray, is_finite: bool) -> tuple[int, float]:
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
def _squared_distances(token: np.ndarray, mean: float) -> float:
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
def _relative_update(before: np.ndarray, after: np.ndarray) -> float:
    change = 0.0
    size = 0.0
    for j in range(before.shape[0]):
        step = np.float64(after[j]) - np.float64(before[j])
        change += step * step
        size += np.float64(before[j]) * np.float64(before[j])
    return np.sqrt(change) / np.sqrt(size)
