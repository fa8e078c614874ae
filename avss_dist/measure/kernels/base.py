"""Interface of the kernels: fused reductions of activations into small accumulators on the same device.

A backend (`Kernels`) adds one batch of one (layer, site) into an `Accumulator`: `kernels.cpu` runs compiled loops over
threads, `kernels.generic` runs wherever torch does. `to_stats` turns accumulators into LayerStats, once per shard.

For 16-bit floats the counts of the 65,536 bit patterns are a sufficient statistic of every elementwise field. For
float32, the upper halves of the patterns of abs(x) are counted, and the other fields are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch

from avss_dist.stats.histogram import CUTS, HISTOGRAM_BINS, values_of_cuts
from avss_dist.stats.layer_stats import Float64, LayerStats, stats_from_pattern_counts
from avss_dist.system.devices import to_host

PATTERNS = 1 << 16
MOST_32_BIT = (1 << 31) - 1
INT, FLOAT = torch.int64, torch.float64

Tensors = dict[str, torch.Tensor]
Shape = tuple[torch.dtype, tuple[int, ...]]


class Accumulator:
    """Running statistics of one (layer, site) on a device.

    Attributes:
        tensors: tensors by name, all on one device.
            16-bit activations: ``patterns`` int32[65536], int64 once that could overflow.
            float32: ``cuts`` int64[32768], ``near_zero`` int64[k], ``elements`` int64[3] (count, zeros, nonfinite),
            ``moments`` float64[2] (mean, m2), ``extremes`` float64[2].
            Always: ``sequences`` int64[1], ``pooled`` float64[1].
            If sums by unit are kept: ``unit_count`` int64[1], ``unit_sums`` float64[2, units].
            If input and output are compared: ``tokens`` int64[2] (angles, input elements), ``geometry`` float64[3]
            (cosine, angular, relative sums), ``input_moments`` float64[2].
    """

    def __init__(self, like: torch.Tensor, thresholds: Float64, *, units: bool, geometry: bool) -> None:
        self.dtype = like.dtype
        self._elements = 0
        self._first_tokens: list[torch.Tensor] = []
        self.thresholds = thresholds
        shapes: dict[str, Shape] = {"sequences": (INT, (1,)), "pooled": (FLOAT, (1,))}
        if like.dtype == torch.float32:
            shapes |= {"cuts": (INT, (CUTS,)), "near_zero": (INT, (len(thresholds),)), "elements": (INT, (3,))}
            shapes |= {"moments": (FLOAT, (2,)), "extremes": (FLOAT, (2,))}
        else:
            shapes["patterns"] = (torch.int32, (PATTERNS,))
        if units:
            shapes |= {"unit_count": (INT, (1,)), "unit_sums": (FLOAT, (2, like.shape[-1]))}
        if geometry:
            shapes |= {"tokens": (INT, (2,)), "geometry": (FLOAT, (3,)), "input_moments": (FLOAT, (2,))}
        self.tensors = _zeros(shapes, like.device)
        if "extremes" in self.tensors:
            self.tensors["extremes"].fill_(torch.inf)[1].neg_()

    @property
    def is_on_host(self) -> bool:
        """Whether the tensors are in host memory."""
        return self.tensors["sequences"].device.type == "cpu"

    def add_first_tokens(self, values: torch.Tensor) -> None:
        """Store the first tokens of rows, [rows, units], for `conclude`. A pass waits only for their copy."""
        self._first_tokens.append(values)

    def conclude(self) -> Tensors:
        """Return ``tensors``. If first tokens were added, it has ``first`` float64[3]: their count, mean and m2."""
        if self._first_tokens:
            values = torch.cat(self._first_tokens).double()
            finite = torch.isfinite(values)
            count = finite.sum().double()
            mean = torch.where(finite, values, 0).sum() / count.clamp_min(1)
            m2 = torch.where(finite, values - mean, 0).square().sum()
            self.tensors["first"] = torch.stack([count, mean, m2])
            self._first_tokens.clear()
        return self.tensors

    def reserve(self, elements: int) -> None:
        """Make room for ``elements`` more counts. Pattern counts are widened to 64 bits when 32 bits could overflow."""
        self._elements += elements
        if self._elements > MOST_32_BIT and "patterns" in self.tensors:
            self.tensors["patterns"] = self.tensors["patterns"].to(torch.int64)


def _zeros(shapes: Mapping[str, Shape], device: torch.device) -> Tensors:
    """Return zero tensors that are views of one buffer, which takes a single allocation and fill on a GPU."""
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in shapes.values()]
    parts = torch.zeros(sum(sizes), dtype=torch.uint8, device=device).split(sizes)
    return {
        name: part.view(dtype).view(shape) for (name, (dtype, shape)), part in zip(shapes.items(), parts, strict=True)
    }


class Kernels(Protocol):
    """Interface of a backend. Each observer has its own, since a backend may keep memory between calls."""

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """Add the elementwise statistics and pooled variances of a batch, and its sums by unit if ``into`` keeps them.

        Args:
            x: [sequences, tokens, units], contiguous, float32 or bfloat16 or float16.
            mask: bool[sequences, tokens] on the device of ``x``, true for tokens that count.
            before: input of a block with output ``x``, of the same shape. With it, each token's angle and relative
                update (of the values as float64) and the moments of the input are added, too.
        """

    def add_update(self, into: Accumulator, after: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> None:
        """Add ``after - before``, rounded to their dtype, as in `add`."""

    def finish(self) -> None:
        """Complete pending additions. Accumulators are up to date only after this call, which ends every layer."""


class UpdateBuffer:
    """Buffer for differences ``after - before``. It is reused across layers, because fresh pages are expensive."""

    def __init__(self) -> None:
        self._buffer: torch.Tensor | None = None

    def subtract(self, after: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """Return the difference, valid until the next call. If the dtypes differ, it has the wider one."""
        if after.dtype != before.dtype:
            return after - before
        if self._buffer is None or self._buffer.shape != after.shape or self._buffer.dtype != after.dtype:
            self._buffer = torch.empty_like(after)
        return torch.sub(after, before, out=self._buffer)


@lru_cache(maxsize=16)
def limits_on(thresholds: bytes, device: torch.device) -> torch.Tensor:
    """Return the `float32_limits` of thresholds on a device, int32[k]. The result is cached.

    Args:
        thresholds: bytes of float64[k].
    """
    limits = float32_limits(np.frombuffer(thresholds, np.float64))
    return torch.from_numpy(limits.view(np.int32).copy()).to(device)


def float32_limits(thresholds: Float64) -> np.ndarray:
    """Return the uint32 pattern of the smallest float32 >= each float64 threshold, so that x < t equals x < limit."""
    limits = thresholds.astype(np.float32)
    limits = np.where(limits.astype(np.float64) < thresholds, np.nextafter(limits, np.float32(np.inf)), limits)
    return limits.view(np.uint32)


def send_stats(accumulators: Sequence[Accumulator], thresholds: Float64) -> Callable[[], list[LayerStats]]:
    """Start the transfer of accumulators, and return a function that waits for it and returns their statistics."""
    concluded = [accumulator.conclude() for accumulator in accumulators]
    like = [(one.dtype, tuple(one.tensors)) for one in accumulators]
    arrived = to_host([tensor for tensors in concluded for tensor in tensors.values()])

    def wait() -> list[LayerStats]:
        arrays = iter(arrived())
        return [to_stats({name: next(arrays) for name in names}, dtype, thresholds) for dtype, names in like]

    return wait


def to_stats(tensors: Mapping[str, np.ndarray], dtype: torch.dtype, thresholds: Float64) -> LayerStats:
    """Return the LayerStats of an accumulator's tensors, which were transferred to the host."""
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
    if "first" in tensors:
        count, fields["first_mean"], fields["first_m2"] = (float(v) for v in tensors["first"])
        fields["first_count"] = int(count)
    return LayerStats(thresholds=thresholds, **fields)


def _float32_fields(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    count, zeros, nonfinite = (int(n) for n in tensors["elements"])
    low, high = (float(v) for v in tensors["extremes"])
    mean, m2 = (float(v) for v in tensors["moments"])
    abs_value, abs_value_count = values_of_cuts(tensors["cuts"])
    return {
        "histogram": tensors["cuts"].reshape(HISTOGRAM_BINS, -1).sum(axis=1),
        "abs_value": abs_value,
        "abs_value_count": abs_value_count,
        "abs_value_cut": True,
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
    """Return the float64 value of each of the 65,536 patterns of a 16-bit float."""
    patterns = torch.arange(PATTERNS, dtype=torch.int32).to(torch.uint16)
    return patterns.view(dtype).double().numpy()
