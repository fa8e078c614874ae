"""The fused reductions: an activation goes in, small accumulators on its own device grow. The seam for new kernels.

`Kernels` names what a backend does to one (layer, site): `CpuKernels` runs compiled loops over threads, `TorchKernels`
runs wherever torch does. Both add into an `Accumulator`, which `to_stats` turns into LayerStats once per shard.

For 16-bit floats the counts of the 65,536 bit patterns are a sufficient statistic of every elementwise field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from avss_dist.stats import (
    HISTOGRAM_BINS,
    HISTOGRAM_SHIFT,
    Float64,
    LayerStats,
    merge_moments,
    stats_from_pattern_counts,
)

PATTERNS = 1 << 16
CHUNK = 1 << 24  # elements that a temporary may hold

Tensors = dict[str, torch.Tensor]


class Accumulator:
    """Device-side running statistics of one (layer, site).

    Attributes:
        tensors: int64 and float64 tensors by name, all on one device:
            ``patterns`` int64[65536] (16-bit activations), or ``histogram`` int64[2048], ``near_zero`` int64[k],
            ``elements`` int64[3] (count, zeros, nonfinite), ``moments`` float64[2] (mean, m2), ``extremes`` float64[2];
            ``sequences`` int64[1], ``pooled`` float64[1];
            ``unit_count`` int64[1], ``unit_sums`` float64[2, units] where units are kept;
            ``tokens`` int64[2] (angles, input elements), ``geometry`` float64[3] (cosine, angular, relative sums),
            ``input_moments`` float64[2] where input and output are compared.
    """

    def __init__(self, like: torch.Tensor, thresholds: Float64, *, units: bool, geometry: bool) -> None:
        def ints(size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.int64, device=like.device)

        def floats(*size: int) -> torch.Tensor:
            return torch.zeros(size, dtype=torch.float64, device=like.device)

        self.dtype = like.dtype
        self.thresholds = thresholds
        self.tensors: Tensors = {"sequences": ints(1), "pooled": floats(1)}
        if like.dtype == torch.float32:
            self.tensors |= {
                "histogram": ints(HISTOGRAM_BINS),
                "near_zero": ints(len(thresholds)),
                "elements": ints(3),
                "moments": floats(2),
                "extremes": torch.tensor([np.inf, -np.inf], dtype=torch.float64, device=like.device),
            }
        else:
            self.tensors["patterns"] = ints(PATTERNS)
        if units:
            self.tensors |= {"unit_count": ints(1), "unit_sums": floats(2, like.shape[-1])}
        if geometry:
            self.tensors |= {"tokens": ints(2), "geometry": floats(3), "input_moments": floats(2)}


class Kernels(Protocol):
    """What a backend adds to an accumulator, from one batch.

    ``x`` is [sequences, tokens, units], contiguous, float32 or bfloat16 or float16; ``mask`` is bool[sequences, tokens]
    on the device of ``x``, True where a token counts.
    """

    def elements(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the elementwise statistics."""

    def units(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor) -> None:
        """Add the pooled variance of each sequence, and the unit sums where the accumulator keeps them."""

    def geometry(
        self, into: Accumulator, before: torch.Tensor, after: torch.Tensor, update: torch.Tensor, mask: torch.Tensor
    ) -> None:
        """Add each token's angle and relative update, and the moments of the input."""


def kernels_for(device: torch.device) -> Kernels:
    """The fastest backend for a device."""
    return CpuKernels() if device.type == "cpu" else TorchKernels()


def float32_limits(thresholds: Float64) -> np.ndarray:
    """The smallest float32 that is not below each float64 threshold, as uint32 patterns: x < t exactly if x < limit."""
    limits = thresholds.astype(np.float32)
    limits = np.where(limits.astype(np.float64) < thresholds, np.nextafter(limits, np.float32(np.inf)), limits)
    return limits.view(np.uint32)


class CpuKernels:
    """Compiled loops, one sequence a task, over as many threads as torch uses."""

    def elements(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor) -> None:
        tokens = mask.numpy()
        if x.dtype == torch.float32:
            self._float32(into.tensors, into.thresholds, x.numpy(), tokens)
            return
        counts = np.zeros((_threads(), PATTERNS), np.int32)
        rows = x.view(torch.uint16).numpy()
        loops = _loops()

        def count(thread: int) -> None:
            for b in range(thread, len(rows), len(counts)):
                loops.count_patterns(rows[b], tokens[b], counts[thread])

        _run(count, len(counts))
        total = into.tensors["patterns"].numpy()
        for part in counts:
            total += part

    def _float32(self, into: Tensors, thresholds: Float64, x: np.ndarray, mask: np.ndarray) -> None:
        loops = _loops()
        limits = float32_limits(thresholds)
        histogram = np.zeros((len(x), HISTOGRAM_BINS), np.int64)
        near_zero = np.zeros((len(x), len(limits)), np.int64)
        extremes = np.tile([np.inf, -np.inf], (len(x), 1))
        parts = _run(
            lambda b: loops.count_float32(x[b], mask[b], limits, histogram[b], near_zero[b], extremes[b]), len(x)
        )
        into["histogram"].numpy()[:] += histogram.sum(0)
        into["near_zero"].numpy()[:] += near_zero.sum(0)
        low_high = into["extremes"].numpy()
        low_high[:] = min(low_high[0], extremes[:, 0].min()), max(low_high[1], extremes[:, 1].max())
        elements = into["elements"].numpy()
        for count, zeros, nonfinite, *moments in parts:
            _merge_on_host(int(elements[0]), into["moments"].numpy(), count, *moments)
            elements += (count, zeros, nonfinite)

    def units(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor) -> None:
        loops = _loops()
        rows, tokens = _as_loops_read(x), mask.numpy()
        keep = "unit_sums" in into.tensors
        sums = np.zeros((len(rows), rows.shape[2]))
        squares = np.zeros((len(rows), rows.shape[2] if keep else 0))
        parts = _run(lambda b: loops.sum_units(rows[b], tokens[b], sums[b], squares[b]), len(rows))
        whole = [b for b, (finite, all_tokens) in enumerate(parts) if finite and finite == all_tokens]
        into.tensors["sequences"].numpy()[0] += len(whole)
        if rows.shape[2] > 1:
            into.tensors["pooled"].numpy()[0] += sum(float((sums[b] / parts[b][0]).var(ddof=1)) for b in whole)
        if keep:
            into.tensors["unit_count"].numpy()[0] += sum(finite for finite, _ in parts)
            into.tensors["unit_sums"].numpy()[:] += np.stack([sums.sum(0), squares.sum(0)])

    def geometry(
        self, into: Accumulator, before: torch.Tensor, after: torch.Tensor, update: torch.Tensor, mask: torch.Tensor
    ) -> None:
        loops = _loops()
        old, new, change, tokens = _as_loops_read(before), _as_loops_read(after), _as_loops_read(update), mask.numpy()
        parts = _run(lambda b: loops.compare_tokens(old[b], new[b], change[b], tokens[b]), len(old))
        seen, sums = into.tensors["tokens"].numpy(), into.tensors["geometry"].numpy()
        for angles, cosine, angular, relative, count, *moments in parts:
            sums += (cosine, angular, relative)
            _merge_on_host(int(seen[1]), into.tensors["input_moments"].numpy(), count, *moments)
            seen += (angles, count)


@lru_cache(maxsize=1)
def _loops() -> Any:
    """The compiled loops, imported (and numba with them) only where a CPU measures."""
    from avss_dist import kernels_cpu

    return kernels_cpu


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="avss-kernels")


def _threads() -> int:
    return torch.get_num_threads()


def _run(task: Callable[[int], Any], count: int) -> list[Any]:
    """Results of ``task(0..count-1)``, in order; the loops release the interpreter."""
    threads = _threads()
    if threads == 1 or count == 1:
        return [task(i) for i in range(count)]
    return list(_pool(threads).map(task, range(count)))


def _as_loops_read(x: torch.Tensor) -> np.ndarray:
    """uint16 patterns of bfloat16, else float32 (float16 is widened, which is exact)."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.float().numpy()


def _merge_on_host(seen: int, moments: Float64, count: int, mean: float, m2: float) -> None:
    moments[:] = merge_moments((seen, *moments.tolist()), (count, mean, m2))[1:]


def _merge_moments(seen: torch.Tensor, moments: torch.Tensor, count: torch.Tensor, mean: Any, m2: Any) -> None:
    """Chan's update of ``moments`` [mean, m2] over ``seen`` elements by ``count`` more, without a host transfer."""
    total = (seen + count).clamp(min=1).double()
    delta = mean - moments[0]
    change = torch.stack([delta * (count / total), m2 + delta * delta * (seen * (count / total))])
    moments += torch.where(count > 0, change, 0)


class TorchKernels:
    """Plain torch operations: deterministic, without a host transfer, temporaries bounded by `CHUNK` elements."""

    def elements(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor) -> None:
        for rows, tokens in _chunks(x, mask):
            if x.dtype == torch.float32:
                self._float32(into.tensors, into.thresholds, rows, tokens)
            else:
                patterns = rows.view(torch.int16).to(torch.int64) & 0xFFFF
                _count_into(into.tensors["patterns"], patterns, tokens)

    def _float32(self, into: Tensors, thresholds: Float64, x: torch.Tensor, mask: torch.Tensor) -> None:
        sizes = x.view(torch.int32) & 0x7FFFFFFF
        finite = (sizes < 0x7F800000) & mask[:, None]
        _count_into(into["histogram"], (sizes >> HISTOGRAM_SHIFT).to(torch.int64), finite)
        limits = torch.from_numpy(float32_limits(thresholds).view(np.int32)).to(x.device)
        into["near_zero"] += torch.stack([((sizes < limit) & finite).sum() for limit in limits])
        count = finite.sum()
        values = torch.where(finite, x, 0).double()
        mean = values.sum() / count.clamp(min=1)
        m2 = torch.where(finite, values - mean, 0).square().sum()
        _merge_moments(into["elements"][0], into["moments"], count, mean, m2)
        into["elements"] += torch.stack([count, ((sizes == 0) & finite).sum(), mask.sum() * x.shape[1] - count])
        low = torch.where(finite, x, torch.inf).amin().double()
        high = torch.where(finite, x, -torch.inf).amax().double()
        into["extremes"].copy_(
            torch.stack([torch.minimum(into["extremes"][0], low), torch.maximum(into["extremes"][1], high)])
        )

    def units(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor) -> None:
        for b in range(len(x)):
            finite = mask[b] & torch.isfinite(x[b]).all(dim=1)
            values = torch.where(finite[:, None], x[b], 0).double()
            tokens = finite.sum()
            sums = values.sum(dim=0)
            whole = (tokens > 0) & (tokens == mask[b].sum())
            into.tensors["sequences"] += whole
            if x.shape[2] > 1:
                into.tensors["pooled"] += torch.where(whole, (sums / tokens.clamp(min=1)).var(), 0)
            if "unit_sums" in into.tensors:
                into.tensors["unit_count"] += tokens
                into.tensors["unit_sums"] += torch.stack([sums, values.square_().sum(dim=0)])

    def geometry(
        self, into: Accumulator, before: torch.Tensor, after: torch.Tensor, update: torch.Tensor, mask: torch.Tensor
    ) -> None:
        for b in range(len(before)):
            finite = mask[b] & torch.isfinite(before[b]).all(dim=1) & torch.isfinite(after[b]).all(dim=1)
            old, new, change = (torch.where(finite[:, None], x[b], 0).double() for x in (before, after, update))
            old_sq, new_sq, change_sq = (v.square().sum(dim=1) for v in (old, new, change))
            angles = (old_sq > 0) & (new_sq > 0) & torch.isfinite(change_sq)
            cosine = ((old * new).sum(dim=1) / (old_sq * new_sq).sqrt()).clamp(-1, 1)
            relative = (change_sq / old_sq).sqrt()
            per_token = torch.stack([cosine, torch.acos(cosine) / torch.pi, relative])
            into.tensors["geometry"] += torch.where(angles, per_token, 0).sum(dim=1)
            count = finite.sum() * before.shape[2]
            mean = old.sum() / count.clamp(min=1)
            m2 = torch.where(finite[:, None], old - mean, 0).square().sum()
            _merge_moments(into.tensors["tokens"][1], into.tensors["input_moments"], count, mean, m2)
            into.tensors["tokens"] += torch.stack([angles.sum(), count])


def _chunks(x: torch.Tensor, mask: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows [n, units] with their mask [n], at most `CHUNK` elements (or one row) at a time."""
    rows = max(1, CHUNK // x.shape[2])
    yield from zip(x.flatten(0, 1).split(rows), mask.flatten().split(rows), strict=True)


def _count_into(counts: torch.Tensor, bins: torch.Tensor, mask: torch.Tensor) -> None:
    """Add how often each bin occurs where the mask (of the shape of ``bins``, or of its rows) is True."""
    weight = mask.to(counts.dtype).reshape(*mask.shape, *[1] * (bins.dim() - mask.dim())).expand(bins.shape)
    counts.scatter_add_(0, bins.reshape(-1), weight.reshape(-1))


def to_stats(tensors: Mapping[str, np.ndarray], dtype: torch.dtype, thresholds: Float64) -> LayerStats:
    """LayerStats from an accumulator's tensors, now on the host."""
    fields: dict[str, Any] = {
        "sequence_count": int(tensors["sequences"][0]),
        "pooled_variance_sum": float(tensors["pooled"][0]),
    }
    if "patterns" in tensors:
        fields |= stats_from_pattern_counts(tensors["patterns"], _pattern_values(dtype), thresholds)
    else:
        fields |= _float32_fields(tensors)
    if "unit_sums" in tensors:
        sums, squares = np.array(tensors["unit_sums"])
        fields |= {"unit_count": int(tensors["unit_count"][0]), "unit_sum": sums, "unit_sum_sq": squares}
    if "tokens" in tensors:
        fields["token_count"], fields["input_count"] = (int(n) for n in tensors["tokens"])
        for name, value in zip(("cosine", "angular", "relative_magnitude"), tensors["geometry"], strict=True):
            fields[f"{name}_sum"] = float(value)
        fields["input_mean"], fields["input_m2"] = (float(v) for v in tensors["input_moments"])
    return LayerStats(thresholds=thresholds, **fields)


def _float32_fields(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    count, zeros, nonfinite = (int(n) for n in tensors["elements"])
    low, high = (float(v) for v in tensors["extremes"])
    mean, m2 = (float(v) for v in tensors["moments"])
    return {
        "histogram": np.array(tensors["histogram"]),
        "near_zero": np.array(tensors["near_zero"]),
        "count": count,
        "zero_count": zeros,
        "nonfinite_count": nonfinite,
        "mean": mean,
        "m2": m2,
        "min": low,
        "max": high,
        "max_abs": max(abs(low), abs(high)) if count else 0.0,
    }


@lru_cache(maxsize=2)
def _pattern_values(dtype: torch.dtype) -> Float64:
    """The float64 value of each of the 65,536 patterns of a 16-bit float."""
    patterns = torch.arange(PATTERNS, dtype=torch.int32).to(torch.uint16)
    return patterns.view(dtype).double().numpy()
