"""What numba has no words for: bit patterns as numbers, cache lines, addresses, atomic counters.

numba's cache of a compiled function knows the time of its own file only: after a change here, or in `loops`, remove
``*.nbi`` from ``__pycache__``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic as _numba_intrinsic

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_BYTES = ir.IntType(8).as_pointer()

intrinsic: Any = _numba_intrinsic


def _float_bits(builder: Any, element: Any) -> Any:
    """The float32 pattern (int32) of a float32, or of a bfloat16 given as its int16 pattern."""
    if isinstance(element.type, ir.IntType):
        return builder.shl(builder.zext(element, _I32), ir.Constant(_I32, 16))
    return builder.bitcast(element, _I32)


@intrinsic
def value(typingctx: Any, element: Any) -> Any:
    """An element as float64."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = _float_bits(builder, arguments[0])
        return builder.fpext(builder.bitcast(bits, ir.FloatType()), ir.DoubleType())

    return types.float64(element), generate


@intrinsic
def pattern(typingctx: Any, element: Any) -> Any:
    """An element's float32 pattern as uint32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _float_bits(builder, arguments[0])

    return types.uint32(element), generate


@intrinsic
def prefetch(typingctx: Any, row: Any, element: Any) -> Any:
    """Ask for the cache line of ``row[element]``, which may lie beyond the row.

    A processor's own prefetching stops at every page of 4 KiB: cold activations were counted at 1.3 billion a second
    without this and at 2.2 with it.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        address = builder.bitcast(builder.gep(array.data, [arguments[1]]), _BYTES)
        kind = ir.FunctionType(ir.VoidType(), [_BYTES, _I32, _I32, _I32])
        function = builder.module.declare_intrinsic("llvm.prefetch", [_BYTES], kind)
        builder.call(function, [address, *(ir.Constant(_I32, n) for n in (0, 3, 1))])  # to read, to keep, data
        return context.get_dummy_value()

    return types.void(row, types.int64), generate


@intrinsic
def at(typingctx: Any, address: Any, dtype: Any) -> Any:
    """An address as a pointer to elements of a dtype."""
    pointer = types.CPointer(dtype.dtype)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, dtype), generate


@intrinsic
def take(typingctx: Any, numbers: Any, place: Any) -> Any:
    """Add one to ``numbers[place]``, int64 behind a pointer, as one step among all threads; returns what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        counters = builder.bitcast(arguments[0], _I64.as_pointer())
        counter = builder.gep(counters, [arguments[1]])
        return builder.atomic_rmw("add", counter, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(numbers, types.int64), generate
