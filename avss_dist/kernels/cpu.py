"""The kernels on a CPU: compiled loops, whole sequences to a thread, so that no result depends on the thread count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from avss_dist.kernels import PATTERNS, Accumulator, float32_limits, loops
from avss_dist.kernels.threads import team
from avss_dist.stats import HISTOGRAM_BINS, Float64, merge_moments

MOST_ELEMENTS = 1 << 32  # that one thread counts in 32 bits before its counts are flushed


class CpuKernels:
    """See `kernels.Kernels`. Keeps the threads' pattern counts from call to call; not for two callers at once."""

    def __init__(self) -> None:
        self._counts = np.zeros((torch.get_num_threads(), PATTERNS), np.uint32)

    def add(
        self,
        into: Accumulator,
        x: torch.Tensor,
        mask: torch.Tensor,
        before: torch.Tensor | None = None,
        update: torch.Tensor | None = None,
    ) -> None:
        """See `kernels.Kernels`."""
        most = max(1, (MOST_ELEMENTS - 1) // (x.shape[1] * x.shape[2]))
        for start in range(0, len(x), most):
            part = slice(start, start + most)
            comparison = None if before is None or update is None else (before[part], update[part])
            self._add(into, x[part], mask[part].numpy(), comparison)

    def _add(
        self,
        into: Accumulator,
        x: torch.Tensor,
        mask: np.ndarray,
        comparison: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> None:
        into.reserve(x.numel())
        values = _as_loops_read(x)
        rows, _, units = values.shape
        sums = np.zeros((rows, units))
        squares = np.zeros((rows, units if "unit_sums" in into.tensors else 0))
        tokens = np.zeros((rows, 2), np.int64)
        pooled = np.zeros((rows, 1))
        measured = values, mask, sums, squares, tokens, pooled
        elements = self._count_float32 if x.dtype == torch.float32 else self._count_patterns
        count, finish = elements(into, x, *measured)
        angles, geometry = np.zeros((rows, 2), np.int64), np.zeros((rows, 5))
        compared = tuple(_as_loops_read(t) for t in comparison) if comparison else None

        def work(thread: int, start: int, stop: int) -> None:
            count(thread, start, stop)
            if compared:
                loops.compare_tokens(compared[0], values, compared[1], mask, start, stop, angles, geometry)

        threads = _spread(work, rows, len(self._counts))
        finish(threads)
        _add_units(into, sums, squares, tokens, pooled[:, 0])
        if compared:
            _add_geometry(into, angles, geometry)

    def _count_patterns(
        self, into: Accumulator, x: torch.Tensor, values: np.ndarray, mask: np.ndarray, *sums: np.ndarray
    ) -> tuple[Callable[[int, int, int], None], Callable[[int], None]]:
        patterns = x.view(torch.uint16).numpy()

        def count(thread: int, start: int, stop: int) -> None:
            loops.measure_patterns(patterns, values, mask, start, stop, self._counts[thread], *sums)

        def finish(threads: int) -> None:
            total = into.tensors["patterns"].numpy()
            for counts in self._counts[:threads]:
                loops.flush_patterns(counts, total)

        return count, finish

    def _count_float32(
        self, into: Accumulator, x: torch.Tensor, values: np.ndarray, mask: np.ndarray, *sums: np.ndarray
    ) -> tuple[Callable[[int, int, int], None], Callable[[int], None]]:
        limits = float32_limits(into.thresholds)
        histogram = np.zeros((len(x), HISTOGRAM_BINS), np.int64)
        near_zero = np.zeros((len(x), len(limits)), np.int64)
        elements = np.zeros((len(x), 3), np.int64)
        moments = np.zeros((len(x), 4))

        def count(_thread: int, start: int, stop: int) -> None:
            counted = limits, histogram, near_zero, elements, moments
            loops.measure_float32(values, mask, start, stop, *counted, *sums)

        def finish(_threads: int) -> None:
            host = {name: tensor.numpy() for name, tensor in into.tensors.items()}
            host["histogram"] += histogram.sum(0)
            host["near_zero"] += near_zero.sum(0)
            low, high = host["extremes"]
            host["extremes"][:] = min(low, moments[:, 2].min()), max(high, moments[:, 3].max())
            for counted, (mean, m2) in zip(elements, moments[:, :2].tolist(), strict=True):
                _merge_into(host["moments"], int(host["elements"][0]), int(counted[0]), mean, m2)
                host["elements"] += counted

        return count, finish


def _add_units(into: Accumulator, sums: Float64, squares: Float64, tokens: np.ndarray, pooled: Float64) -> None:
    whole = pooled[~np.isnan(pooled)]
    into.tensors["sequences"].numpy()[0] += len(whole)
    into.tensors["pooled"].numpy()[0] += whole.sum()
    if "unit_sums" in into.tensors:
        into.tensors["unit_count"].numpy()[0] += tokens[:, 0].sum()
        kept = into.tensors["unit_sums"].numpy()
        kept[0] += sums.sum(0)
        kept[1] += squares.sum(0)


def _add_geometry(into: Accumulator, angles: np.ndarray, geometry: Float64) -> None:
    seen = into.tensors["tokens"].numpy()
    into.tensors["geometry"].numpy()[:] += geometry[:, :3].sum(0)
    for counted, (mean, m2) in zip(angles, geometry[:, 3:].tolist(), strict=True):
        _merge_into(into.tensors["input_moments"].numpy(), int(seen[1]), int(counted[1]), mean, m2)
        seen += counted


def _merge_into(moments: Float64, seen: int, count: int, mean: float, m2: float) -> None:
    """Chan's update of ``moments`` [mean, m2] over ``seen`` elements by ``count`` more."""
    moments[:] = merge_moments((seen, *moments.tolist()), (count, mean, m2))[1:]


def _as_loops_read(x: torch.Tensor) -> np.ndarray:
    """uint16 patterns of bfloat16, else float32 (float16 is widened, which is exact)."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.float().numpy()


def _spread(work: Callable[[int, int, int], Any], rows: int, most: int) -> int:
    """Call ``work(thread, start, stop)`` for consecutive ranges of rows, one a thread; returns how many there were."""
    threads = min(rows, most)
    edges = [rows * i // threads for i in range(threads + 1)]
    if threads == 1:
        work(0, 0, rows)
    else:
        team().run(lambda thread: work(thread, edges[thread], edges[thread + 1]), threads)
    return threads
