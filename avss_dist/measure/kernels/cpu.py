"""CPU kernels: compiled loops in the calling thread, sequence by sequence, with sums in a fixed order.

Concurrent shards, each in a thread of its own, use more cores, since the loops release Python's lock.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from avss_dist.measure.kernels.base import PATTERNS, Accumulator, UpdateBuffer, float32_limits
from avss_dist.measure.kernels.loops import measure_float32, measure_patterns
from avss_dist.measure.kernels.merging import merge_elements, merge_geometry, merge_patterns, merge_units

MAX_ELEMENTS = 1 << 32  # that are counted in 32 bits before the counts are flushed


class CpuKernels:
    """CPU backend, see `kernels.base.Kernels`. It reuses scratch memory between calls and is not thread-safe."""

    def __init__(self) -> None:
        self._counts = np.zeros(PATTERNS, np.uint32)
        self._scratch: dict[tuple[int, ...], _Scratch] = {}
        self._updates = UpdateBuffer()

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """See `kernels.base.Kernels`."""
        rows = max(1, (MAX_ELEMENTS - 1) // (x.shape[1] * x.shape[2]))
        tensors = (x, mask) if before is None else (x, mask, before)
        for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
            self._add(into, *parts)

    def add_update(self, into: Accumulator, after: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> None:
        """See `kernels.base.Kernels`."""
        self.add(into, self._updates.subtract(after, before), mask)

    def finish(self) -> None:
        """Do nothing: `add` is complete when it returns."""

    def _add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        into.reserve(x.numel())
        totals = {name: tensor.numpy() for name, tensor in into.tensors.items()}
        scratch = self._scratch_for(x, into)
        values = _as_loops_read(x)
        inputs = values if before is None else _as_loops_read(before)
        comparison = before is not None, inputs, scratch.angles, scratch.geometry
        summed = scratch.sums, scratch.squares, scratch.seen, scratch.pooled
        if x.dtype == torch.float32:
            elements = scratch.near_zero, scratch.elements, scratch.moments
            limits = _limits(into.thresholds.tobytes())
            measure_float32(values, mask.contiguous().numpy(), limits, self._counts, elements, summed, comparison)
            merge_patterns(self._counts, totals["cuts"])
            merge_elements(*elements, *(totals[name] for name in ("near_zero", "elements", "moments", "extremes")))
        else:
            measure_patterns(_patterns(x), values, mask.contiguous().numpy(), self._counts, summed, comparison)
            merge_patterns(self._counts, totals["patterns"])
        counted = scratch.pooled, totals["sequences"], totals["pooled"]
        if "unit_sums" in totals:
            merge_units(*counted, *summed[:3], totals["unit_count"], totals["unit_sums"])
        else:
            merge_units(*counted, *summed[:3], _NO_COUNT, _NO_SUMS)
        if before is not None:
            all_compared = totals["tokens"], totals["geometry"], totals["input_moments"]
            merge_geometry(scratch.angles, scratch.geometry, *all_compared)

    def _scratch_for(self, x: torch.Tensor, into: Accumulator) -> _Scratch:
        squares = x.shape[2] if "unit_sums" in into.tensors else 0
        key = (x.shape[0], x.shape[2], squares, len(into.thresholds))
        if key not in self._scratch:
            self._scratch[key] = _Scratch(*key)
        return self._scratch[key]


class _Scratch:
    """Buffers for the sums of each sequence. See `loops.measure_patterns` and `loops.measure_float32`."""

    def __init__(self, rows: int, units: int, squared: int, thresholds: int) -> None:
        self.sums = np.empty((rows, units))
        self.squares = np.empty((rows, squared))
        self.seen = np.empty((rows, 2), np.int64)
        self.pooled = np.empty((rows, 1))
        self.angles = np.empty((rows, 2), np.int64)
        self.geometry = np.empty((rows, 5))
        self.near_zero = np.empty((rows, thresholds), np.int64)
        self.elements = np.empty((rows, 3), np.int64)
        self.moments = np.empty((rows, 4))


_NO_COUNT, _NO_SUMS = np.zeros(1, np.int64), np.empty((2, 0))


@lru_cache(maxsize=8)
def _limits(thresholds: bytes) -> np.ndarray:
    return float32_limits(np.frombuffer(thresholds, np.float64))


def _patterns(x: torch.Tensor) -> np.ndarray:
    """Return the bits of a 16-bit tensor, uint16."""
    return _array(x.view(torch.int16)).view(np.uint16)


def _as_loops_read(x: torch.Tensor) -> np.ndarray:
    """Return a tensor as the loops read it: bfloat16 as uint16 patterns, float32 unchanged, float16 as float32."""
    return _patterns(x) if x.dtype == torch.bfloat16 else _array(x.float())


def _array(x: torch.Tensor) -> np.ndarray:
    """Return a tensor's memory as an array. `torch.Tensor.numpy` would keep streaming from freeing the memory."""
    return np.from_dlpack(x)
