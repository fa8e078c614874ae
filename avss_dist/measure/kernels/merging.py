"""Addition of the loops' results for each sequence to an accumulator, in the order of the sequences."""

from __future__ import annotations

from typing import Any

import numpy as np

from avss_dist.measure.kernels.compiling import compiled

_compiled = compiled()


@_compiled
def merge_patterns(counts: Any, total: Any) -> None:
    """Add uint32 ``counts`` to int32 or int64 ``total``, which may be shorter, and reset the added counts to zero."""
    for first in range(0, total.shape[0], 64):
        here, all_here = counts[first : first + 64], total[first : first + 64]
        seen = np.uint32(0)
        for i in range(64):
            seen |= here[i]
        if seen:
            for i in range(64):
                all_here[i] += here[i]
            here[:] = 0


@_compiled
def _merge(total: Any, seen: int, count: int, mean: float, m2: float) -> None:
    """Update ``total`` [mean, m2] of ``seen`` elements by ``count`` more (Chan)."""
    if count:
        delta = mean - total[0]
        total[0] += delta * (count / (seen + count))
        total[1] += m2 + delta * delta * (seen * (count / (seen + count)))


@_compiled
def merge_elements(
    near_zeros: Any, elements: Any, moments: Any, near_zero: Any, total: Any, merged: Any, extremes: Any
) -> None:
    """Add the counts and moments of each sequence's float32 elements to those of an accumulator."""
    for b in range(elements.shape[0]):
        near_zero += near_zeros[b]
        _merge(merged, total[0], elements[b, 0], moments[b, 0], moments[b, 1])
        total += elements[b]
        extremes[0], extremes[1] = min(extremes[0], moments[b, 2]), max(extremes[1], moments[b, 3])


@_compiled
def merge_units(
    pooled: Any,
    sequences: Any,
    pooled_total: Any,
    sums: Any,
    squares: Any,
    seen: Any,
    unit_count: Any,
    unit_sums: Any,
) -> None:
    """Add each sequence's pooled variance and, unless ``unit_sums`` is empty, its sums by unit."""
    for b in range(pooled.shape[0]):
        if not np.isnan(pooled[b, 0]):
            sequences[0] += 1
            pooled_total[0] += pooled[b, 0]
    if unit_sums.shape[1]:
        for b in range(pooled.shape[0]):
            unit_count[0] += seen[b, 0]
            unit_sums[0] += sums[b]
            unit_sums[1] += squares[b]


@_compiled
def merge_geometry(angles: Any, geometry: Any, tokens: Any, total: Any, moments: Any) -> None:
    """Add each sequence's comparison of a block's input with its output."""
    for b in range(angles.shape[0]):
        total += geometry[b, :3]
        _merge(moments, tokens[1], angles[b, 1], geometry[b, 3], geometry[b, 4])
        tokens += angles[b]
