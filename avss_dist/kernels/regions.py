"""The loops as parallel regions: compiled functions that every thread of a team enters, until no sequence is left.

No thread needs Python's lock, so a region starts in microseconds. What a region works on is a record of addresses and
sizes, `CALL`. Which thread takes which sequence changes nothing: counts are integers, and sums are kept by sequence.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic

from avss_dist.kernels.loops import compare_tokens, measure_float32, measure_patterns

FIELDS = (
    *("next", "entered"),  # the first sequence that no thread has taken; how many threads came in
    *("rows", "tokens", "units", "squared", "compared", "num_limits"),
    *("raw", "values", "mask", "before", "update"),  # addresses of the tensors
    *("counts", "sums", "squares", "seen", "pooled"),  # of `loops.measure_patterns`
    *("limits", "histogram", "near_zero", "elements", "moments"),  # of `loops.measure_float32`
    *("angles", "geometry"),  # of `loops.compare_tokens`
)
CALL = np.dtype([(name, np.int64) for name in FIELDS])
NEXT, ENTERED = FIELDS.index("next"), FIELDS.index("entered")
PATTERNS, BINS = 1 << 16, 1 << 11
_Call = types.CPointer(from_dtype(CALL))

_inline = njit(nogil=True, cache=True)
_region = cfunc(types.void(types.voidptr), cache=True)


@intrinsic
def _at(typingctx: Any, address: Any, dtype: Any) -> Any:
    """An address as a pointer to elements of a dtype."""
    pointer = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, dtype), generate


@intrinsic
def _call(typingctx: Any, pointer: Any) -> Any:
    """The region's argument as a pointer to a `CALL`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], context.get_value_type(_Call))

    return _Call(pointer), generate


@intrinsic
def _take(typingctx: Any, pointer: Any, field: Any) -> Any:
    """Add one to an int64 of the `CALL`, as one step among all threads; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        numbers = builder.bitcast(arguments[0], ir.IntType(64).as_pointer())
        one = ir.Constant(ir.IntType(64), 1)
        return builder.atomic_rmw("add", builder.gep(numbers, [arguments[1]]), one, "seq_cst")

    return types.int64(pointer, types.int64), generate


@_inline
def _compare(call: Any, kind: Any, mask: Any, b: int) -> None:
    shape = (call.rows, call.tokens, call.units)
    before, after = carray(_at(call.before, kind), shape), carray(_at(call.values, kind), shape)
    update = carray(_at(call.update, kind), shape)
    angles = carray(_at(call.angles, np.int64), (call.rows, 2))
    geometry = carray(_at(call.geometry, np.float64), (call.rows, 5))
    compare_tokens(before, after, update, mask, b, b + 1, angles, geometry)


@_inline
def _measure_patterns(pointer: Any, kind: Any) -> None:
    call = carray(_call(pointer), 1)[0]
    rows, units = call.rows, call.units
    raw = carray(_at(call.raw, np.uint16), (rows, call.tokens, units))
    values = carray(_at(call.values, kind), (rows, call.tokens, units))
    mask = carray(_at(call.mask, np.uint8), (rows, call.tokens))
    sums = carray(_at(call.sums, np.float64), (rows, units))
    squares = carray(_at(call.squares, np.float64), (rows, call.squared))
    seen, pooled = carray(_at(call.seen, np.int64), (rows, 2)), carray(_at(call.pooled, np.float64), (rows, 1))
    thread = _take(pointer, ENTERED)
    counts = carray(_at(call.counts + thread * PATTERNS * 4, np.uint32), PATTERNS)
    b = _take(pointer, NEXT)
    while b < rows:
        measure_patterns(raw, values, mask, b, b + 1, counts, sums, squares, seen, pooled)
        if call.compared:
            _compare(call, kind, mask, b)
        b = _take(pointer, NEXT)


@_region
def measure_bfloat16(pointer: Any) -> None:
    """`loops.measure_patterns` of bfloat16, then `loops.compare_tokens` where there is an input to compare with."""
    _measure_patterns(pointer, np.uint16)


@_region
def measure_float16(pointer: Any) -> None:
    """The same of float16; ``values``, ``before`` and ``update`` are widened to float32."""
    _measure_patterns(pointer, np.float32)


@_region
def measure_wide(pointer: Any) -> None:
    """`loops.measure_float32`, then `loops.compare_tokens` where there is an input to compare with."""
    call = carray(_call(pointer), 1)[0]
    rows, units = call.rows, call.units
    values = carray(_at(call.values, np.float32), (rows, call.tokens, units))
    mask = carray(_at(call.mask, np.uint8), (rows, call.tokens))
    limits = carray(_at(call.limits, np.uint32), call.num_limits)
    histogram = carray(_at(call.histogram, np.int64), (rows, BINS))
    near_zero = carray(_at(call.near_zero, np.int64), (rows, call.num_limits))
    elements = carray(_at(call.elements, np.int64), (rows, 3))
    moments = carray(_at(call.moments, np.float64), (rows, 4))
    sums = carray(_at(call.sums, np.float64), (rows, units))
    squares = carray(_at(call.squares, np.float64), (rows, call.squared))
    seen, pooled = carray(_at(call.seen, np.int64), (rows, 2)), carray(_at(call.pooled, np.float64), (rows, 1))
    b = _take(pointer, NEXT)
    while b < rows:
        counted = (histogram, near_zero, elements, moments, sums, squares, seen, pooled)
        measure_float32(values, mask, b, b + 1, limits, *counted)
        if call.compared:
            _compare(call, np.float32, mask, b)
        b = _take(pointer, NEXT)
