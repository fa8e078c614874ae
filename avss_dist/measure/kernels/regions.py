"""The loops as parallel regions: compiled functions that every thread of a team enters, until no sequence is left.

No thread needs Python's lock, so a region starts in microseconds. What a region works on is a `CALL`, a record of
sizes and addresses. Which thread takes which sequence changes nothing: counts are integers, and sums are kept by
sequence until `finish_patterns` or `finish_wide` adds them up, in order, on one thread.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types

from avss_dist.measure.kernels.intrinsics import at, take
from avss_dist.measure.kernels.loops import compare_tokens, flush_patterns, measure_float32, measure_patterns
from avss_dist.stats.histogram import CUTS

FIELDS = (
    *("next", "entered"),  # the first sequence that no thread has taken; how many threads came in
    *("rows", "tokens", "units", "squared", "compared", "num_limits", "count_bytes"),
    *("raw", "x", "mask", "before", "update"),  # addresses: the tensors
    *("counts", "sums", "squares", "seen", "pooled"),  # by sequence, of `loops.measure_patterns`
    *("limits", "near_zeros", "elements", "moments"),  # by sequence, of `loops.measure_float32`
    *("angles", "geometry"),  # by sequence, of `loops.compare_tokens`
    *("all_sequences", "all_pooled", "all_unit_count", "all_unit_sums"),  # the tensors of an `Accumulator`
    *("all_tokens", "all_geometry", "all_input_moments", "all_patterns"),
    *("all_cuts", "all_near_zero", "all_elements", "all_moments", "all_extremes"),
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
NEXT, ENTERED = FIELDS.index("next"), FIELDS.index("entered")
PATTERNS = 1 << 16

_compiled: Any = njit(nogil=True, cache=True, error_model="numpy")
_c_function: Any = cfunc(types.void(types.CPointer(from_dtype(CALL))), cache=True)


@_compiled
def _sums(call: Any) -> Any:
    """By sequence: sums and squares over units, tokens seen, pooled variance."""
    rows = call.rows
    sums = carray(at(call.sums, np.float64), (rows, call.units))
    squares = carray(at(call.squares, np.float64), (rows, call.squared))
    return sums, squares, carray(at(call.seen, np.int64), (rows, 2)), carray(at(call.pooled, np.float64), (rows, 1))


@_compiled
def _counts(call: Any, thread: int) -> Any:
    """Of one thread: uint32[65536]."""
    return carray(at(call.counts + thread * PATTERNS * 4, np.uint32), PATTERNS)


@_compiled
def _elementwise(call: Any) -> Any:
    """By sequence, of float32: near-zero counts, elements, moments."""
    rows = call.rows
    near_zeros = carray(at(call.near_zeros, np.int64), (rows, call.num_limits))
    elements = carray(at(call.elements, np.int64), (rows, 3))
    return near_zeros, elements, carray(at(call.moments, np.float64), (rows, 4))


@_compiled
def _comparison(call: Any) -> Any:
    """By sequence: tokens and elements compared, sums of the geometry."""
    return carray(at(call.angles, np.int64), (call.rows, 2)), carray(at(call.geometry, np.float64), (call.rows, 5))


@_compiled
def _compare(call: Any, kind: Any, mask: Any, b: int) -> None:
    shape = (call.rows, call.tokens, call.units)
    before, after = carray(at(call.before, kind), shape), carray(at(call.x, kind), shape)
    update = carray(at(call.update, kind), shape)
    angles, geometry = _comparison(call)
    compare_tokens(before, after, update, mask, b, b + 1, angles, geometry)


@_compiled
def _measure_patterns(pointer: Any, kind: Any) -> None:
    call = carray(pointer, 1)[0]
    shape = (call.rows, call.tokens, call.units)
    raw, x = carray(at(call.raw, np.uint16), shape), carray(at(call.x, kind), shape)
    mask = carray(at(call.mask, np.uint8), (call.rows, call.tokens))
    sums, squares, seen, pooled = _sums(call)
    counts = _counts(call, take(pointer, ENTERED))
    b = take(pointer, NEXT)
    while b < call.rows:
        sums[b], squares[b] = 0.0, 0.0
        measure_patterns(raw, x, mask, b, b + 1, counts, sums, squares, seen, pooled)
        if call.compared:
            _compare(call, kind, mask, b)
        b = take(pointer, NEXT)


@_c_function
def measure_bfloat16(pointer: Any) -> None:
    """`loops.measure_patterns` of bfloat16, then `loops.compare_tokens` where there is an input to compare with."""
    _measure_patterns(pointer, np.uint16)


@_c_function
def measure_float16(pointer: Any) -> None:
    """The same of float16; ``x``, ``before`` and ``update`` are widened to float32."""
    _measure_patterns(pointer, np.float32)


@_c_function
def measure_wide(pointer: Any) -> None:
    """`loops.measure_float32`, then `loops.compare_tokens` where there is an input to compare with."""
    call = carray(pointer, 1)[0]
    x = carray(at(call.x, np.float32), (call.rows, call.tokens, call.units))
    mask = carray(at(call.mask, np.uint8), (call.rows, call.tokens))
    limits = carray(at(call.limits, np.uint32), call.num_limits)
    near_zeros, elements, moments = _elementwise(call)
    sums, squares, seen, pooled = _sums(call)
    counts = _counts(call, take(pointer, ENTERED))
    b = take(pointer, NEXT)
    while b < call.rows:
        near_zeros[b], sums[b], squares[b] = 0, 0.0, 0.0
        measured = (near_zeros, elements, moments, sums, squares, seen, pooled)
        measure_float32(x, mask, b, b + 1, limits, counts, *measured)
        if call.compared:
            _compare(call, np.float32, mask, b)
        b = take(pointer, NEXT)


@_compiled
def _merge(total: Any, seen: int, count: int, mean: float, m2: float) -> None:
    """Chan's update of ``total`` [mean, m2] over ``seen`` elements by ``count`` more."""
    if count:
        delta = mean - total[0]
        total[0] += delta * (count / (seen + count))
        total[1] += m2 + delta * delta * (seen * (count / (seen + count)))


@_compiled
def _finish(call: Any) -> None:
    sums, squares, seen, pooled = _sums(call)
    sequences, pooled_total = carray(at(call.all_sequences, np.int64), 1), carray(at(call.all_pooled, np.float64), 1)
    for b in range(call.rows):
        if not np.isnan(pooled[b, 0]):
            sequences[0] += 1
            pooled_total[0] += pooled[b, 0]
    if call.squared:
        unit_count = carray(at(call.all_unit_count, np.int64), 1)
        unit_sums = carray(at(call.all_unit_sums, np.float64), (2, call.units))
        for b in range(call.rows):
            unit_count[0] += seen[b, 0]
            unit_sums[0] += sums[b]
            unit_sums[1] += squares[b]
    if call.compared:
        angles, geometry = _comparison(call)
        tokens, total = carray(at(call.all_tokens, np.int64), 2), carray(at(call.all_geometry, np.float64), 3)
        moments = carray(at(call.all_input_moments, np.float64), 2)
        for b in range(call.rows):
            total += geometry[b, :3]
            _merge(moments, tokens[1], angles[b, 1], geometry[b, 3], geometry[b, 4])
            tokens += angles[b]


@_c_function
def finish_patterns(pointer: Any) -> None:
    """Add what a region measured in a 16-bit tensor to the accumulator, and clear the threads' counts."""
    call = carray(pointer, 1)[0]
    for thread in range(call.entered):
        counts = _counts(call, thread)
        if call.count_bytes == 4:
            flush_patterns(counts, carray(at(call.all_patterns, np.int32), PATTERNS))
        else:
            flush_patterns(counts, carray(at(call.all_patterns, np.int64), PATTERNS))
    _finish(call)


@_c_function
def finish_wide(pointer: Any) -> None:
    """Add what a region measured in a float32 tensor to the accumulator, and clear the threads' counts."""
    call = carray(pointer, 1)[0]
    for thread in range(call.entered):
        flush_patterns(_counts(call, thread), carray(at(call.all_cuts, np.int64), CUTS))
    near_zeros, elements, moments = _elementwise(call)
    near_zero = carray(at(call.all_near_zero, np.int64), call.num_limits)
    total, merged = carray(at(call.all_elements, np.int64), 3), carray(at(call.all_moments, np.float64), 2)
    extremes = carray(at(call.all_extremes, np.float64), 2)
    for b in range(call.rows):
        near_zero += near_zeros[b]
        _merge(merged, total[0], elements[b, 0], moments[b, 0], moments[b, 1])
        total += elements[b]
        extremes[0], extremes[1] = min(extremes[0], moments[b, 2]), max(extremes[1], moments[b, 3])
    _finish(call)
