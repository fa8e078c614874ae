"""Accumulators, the interface of the kernels that add to them, and the kernels of plain torch operations.

A backend (`Kernels`) adds one batch of one (layer, site) into an `Accumulator`. `send_stats` turns accumulators into
LayerStats, once per shard.

For 16-bit floats the counts of the 65,536 bit patterns are a sufficient statistic of every elementwise field. For
float32, the upper halves of the patterns of abs(x) are counted, and the other fields are summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
import torch

from avss_dist.core.devices import to_host
from avss_dist.core.values import NewRow
from avss_dist.stats.layer_stats import (
    CUT_SHIFT,
    CUTS,
    HISTOGRAM_BINS,
    Float64,
    LayerStats,
    stats_from_pattern_counts,
    values_of_cuts,
)

PATTERNS = 1 << 16
MOST_32_BIT = (1 << 31) - 1
INT = torch.int64
FLOAT = torch.float64
CHUNK = 1 << 24
"""Number of elements that a temporary may hold, or one sequence."""
_SIZE_BITS = 0x7FFFFFFF
"""Bits of a float32 without its sign."""
_INFINITE = 0x7F800000
"""Pattern of infinity in float32. Those of other values that are not finite are larger."""

Tensors = dict[str, torch.Tensor]

FIELDS: dict[str, tuple[torch.dtype, tuple[str, ...]]] = {
    "sequences": (INT, ("sequence_count",)),
    "pooled": (FLOAT, ("pooled_variance_sum",)),
    "elements": (INT, ("count", "zero_count", "nonfinite_count")),
    "moments": (FLOAT, ("mean", "m2")),
    "extremes": (FLOAT, ("min", "max")),
    "unit_count": (INT, ("unit_count",)),
    "unit_sums": (FLOAT, ("unit_sum", "unit_sum_sq")),
    "tokens": (INT, ("token_count", "input_count")),
    "geometry": (FLOAT, ("cosine_sum", "angular_sum", "relative_magnitude_sum")),
    "input_moments": (FLOAT, ("input_mean", "input_m2")),
    "first": (FLOAT, ("first_count", "first_mean", "first_m2")),
}
"""Dtype and fields of LayerStats of an accumulator's tensors. Entries of ``unit_sums`` are arrays by unit."""


@dataclass(frozen=True)
class _Layout:
    """Name, dtype and shape of a tensor of an accumulator."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


class Accumulator:
    """Running statistics of one (layer, site) on a device.

    Attributes:
        tensors: tensors by name, all on one device: those of `FIELDS` that are measured, and counts.
            16-bit activations: ``patterns`` int32[65536], int64 once that could overflow.
            float32: ``cuts`` int64[32768], ``near_zero`` int64[k].
    """

    def __init__(self, like: torch.Tensor, thresholds: Float64, *, units: bool, geometry: bool) -> None:
        self.dtype = like.dtype
        self.device = like.device
        self.thresholds = thresholds
        self._elements = 0
        self._first_tokens: list[torch.Tensor] = []
        layouts: list[_Layout] = []
        names = ["sequences", "pooled"]
        if like.dtype == torch.float32:
            layouts.append(_Layout("cuts", INT, (CUTS,)))
            layouts.append(_Layout("near_zero", INT, (len(thresholds),)))
            names += ["elements", "moments", "extremes"]
        else:
            layouts.append(_Layout("patterns", torch.int32, (PATTERNS,)))
        if units:
            names += ["unit_count", "unit_sums"]
        if geometry:
            names += ["tokens", "geometry", "input_moments"]
        for name in names:
            dtype, fields = FIELDS[name]
            shape: tuple[int, ...] = (len(fields),)
            if name == "unit_sums":
                shape = (len(fields), like.shape[-1])
            layouts.append(_Layout(name, dtype, shape))
        # All are views of one buffer: a single allocation and fill on a GPU.
        sizes = [layout.size for layout in layouts]
        parts = torch.zeros(sum(sizes), dtype=torch.uint8, device=like.device).split(sizes)
        self.tensors: Tensors = {}
        for layout, part in zip(layouts, parts, strict=True):
            self.tensors[layout.name] = part.view(layout.dtype).view(layout.shape)
        if "extremes" in self.tensors:
            self.tensors["extremes"][0] = torch.inf
            self.tensors["extremes"][1] = -torch.inf

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
    is_below = limits.astype(np.float64) < thresholds
    limits = np.where(is_below, np.nextafter(limits, np.float32(np.inf)), limits)
    return limits.view(np.uint32)


def send_stats(accumulators: Sequence[Accumulator]) -> Callable[[], list[LayerStats]]:
    """Start the transfer of accumulators, and return a function that waits for it and returns their statistics."""
    arrived = to_host([accumulator.conclude() for accumulator in accumulators])
    # Accumulators are not kept until then, so that their memory on the device is free.
    dtypes = [accumulator.dtype for accumulator in accumulators]
    thresholds = [accumulator.thresholds for accumulator in accumulators]

    def wait() -> list[LayerStats]:
        return [to_stats(*values) for values in zip(arrived(), dtypes, thresholds, strict=True)]

    return wait


def to_stats(tensors: Mapping[str, np.ndarray], dtype: torch.dtype, thresholds: Float64) -> LayerStats:
    """Return the LayerStats of an accumulator's tensors, which were transferred to the host."""
    fields: NewRow = {}
    for name, values in tensors.items():
        if name in FIELDS:
            _, names = FIELDS[name]
            entries = values.tolist() if values.ndim == 1 else values.copy()
            fields |= zip(names, entries, strict=True)
    if "first" in tensors:
        fields["first_count"] = int(fields["first_count"])
    if "patterns" in tensors:
        fields |= stats_from_pattern_counts(tensors["patterns"], values_of_patterns(dtype), thresholds)
    else:
        abs_value, abs_value_count = values_of_cuts(tensors["cuts"])
        fields["histogram"] = tensors["cuts"].reshape(HISTOGRAM_BINS, -1).sum(axis=1)
        fields["abs_value"] = abs_value
        fields["abs_value_count"] = abs_value_count
        fields["abs_value_cut"] = True
        fields["near_zero"] = np.array(tensors["near_zero"])
        fields["max_abs"] = 0.0
        if fields["count"]:
            fields["max_abs"] = max(abs(fields["min"]), abs(fields["max"]))
    return LayerStats(thresholds=thresholds, **fields)


@cache
def values_of_patterns(dtype: torch.dtype) -> Float64:
    """Return the value of every pattern of a 16-bit dtype, float64[65536]. The result is cached, and read-only."""
    every_pattern = torch.from_numpy(np.arange(PATTERNS, dtype=np.uint16))
    values: Float64 = every_pattern.view(dtype).double().numpy()
    values.flags.writeable = False
    return values


class Kernels:
    """Backend of torch operations, deterministic and without host transfers. Faster backends override it.

    Temporaries have up to `CHUNK` elements. Each observer has its own backend, which may keep memory between calls.
    """

    def add(self, into: Accumulator, x: torch.Tensor, mask: torch.Tensor, before: torch.Tensor | None = None) -> None:
        """Add the elementwise statistics and pooled variances of a batch, and its sums by unit if ``into`` keeps them.

        Args:
            x: [sequences, tokens, units], contiguous, float32 or bfloat16 or float16.
            mask: bool[sequences, tokens] on the device of ``x``, true for tokens that count.
            before: input of a block with output ``x``, of the same shape. With it, each token's angle and relative
                update (of the values as float64) and the moments of the input are added, too.
        """
        into.reserve(x.numel())
        size = max(1, CHUNK // x.shape[2])
        for tokens, counted in zip(x.flatten(0, 1).split(size), mask.flatten().split(size), strict=True):
            if x.dtype == torch.float32:
                self._float32(into.tensors, into.thresholds, tokens, counted)
            else:
                patterns = tokens.view(torch.int16).to(torch.int64) & 0xFFFF
                _count_into(into.tensors["patterns"], patterns, counted)
        rows = max(1, CHUNK // max(1, x.shape[1] * x.shape[2]))
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            self._units(into.tensors, x[part], mask[part])
            if before is not None:
                self._geometry(into.tensors, before[part], x[part], mask[part])

    def add_update(self, into: Accumulator, after: torch.Tensor, before: torch.Tensor, mask: torch.Tensor) -> None:
        """Add ``after - before``, rounded to the wider of their dtypes, as in `add`."""
        self.add(into, after - before, mask)

    def finish(self) -> None:
        """Complete pending additions. Accumulators are up to date only after this call, which ends every layer."""

    def _float32(self, into: Tensors, thresholds: Float64, x: torch.Tensor, mask: torch.Tensor) -> None:
        sizes = x.view(torch.int32) & _SIZE_BITS
        finite = (sizes < _INFINITE) & mask[:, None]
        _count_into(into["cuts"], (sizes >> CUT_SHIFT).to(torch.int64), finite)
        limits = limits_on(thresholds.tobytes(), x.device)
        into["near_zero"] += torch.stack([((sizes < limit) & finite).sum() for limit in limits])
        count = finite.sum()
        values = torch.where(finite, x, 0).double()
        mean = values.sum() / count.clamp(min=1)
        m2 = torch.where(finite, values - mean, 0).square().sum()
        _merge_moments(into["elements"][0], into["moments"], count, mean, m2)
        zeros = ((sizes == 0) & finite).sum()
        nonfinite = mask.sum() * x.shape[1] - count
        into["elements"] += torch.stack([count, zeros, nonfinite])
        low = torch.where(finite, x, torch.inf).amin().double()
        high = torch.where(finite, x, -torch.inf).amax().double()
        lowest, highest = into["extremes"]
        into["extremes"].copy_(torch.stack([torch.minimum(lowest, low), torch.maximum(highest, high)]))

    def _units(self, into: Tensors, x: torch.Tensor, mask: torch.Tensor) -> None:
        finite = mask & torch.isfinite(x).all(dim=2)
        values = torch.where(finite[..., None], x, 0).double()
        tokens = finite.sum(dim=1)
        sums = values.sum(dim=1)
        whole = (tokens > 0) & (tokens == mask.sum(dim=1))
        into["sequences"] += whole.sum()
        if x.shape[2] > 1:
            means = sums / tokens.clamp(min=1)[:, None]
            into["pooled"] += torch.where(whole, means.var(dim=1), 0).sum()
        if "unit_sums" in into:
            into["unit_count"] += tokens.sum()
            into["unit_sums"] += torch.stack([sums.sum(dim=0), values.square_().sum(dim=(0, 1))])

    def _geometry(self, into: Tensors, before: torch.Tensor, after: torch.Tensor, mask: torch.Tensor) -> None:
        finite = mask & torch.isfinite(before).all(dim=2) & torch.isfinite(after).all(dim=2)
        old = torch.where(finite[..., None], before, 0).double()
        new = torch.where(finite[..., None], after, 0).double()
        old_sq = old.square().sum(dim=2)
        new_sq = new.square().sum(dim=2)
        change_sq = (new - old).square().sum(dim=2)
        angles = (old_sq > 0) & (new_sq > 0)
        cosine = ((old * new).sum(dim=2) / (old_sq * new_sq).sqrt()).clamp(-1, 1)
        angle = torch.acos(cosine) / torch.pi
        relative = (change_sq / old_sq).sqrt()
        per_token = torch.stack([cosine, angle, relative])
        into["geometry"] += torch.where(angles, per_token, 0).sum(dim=(1, 2))
        count = finite.sum() * before.shape[2]
        mean = old.sum() / count.clamp(min=1)
        m2 = torch.where(finite[..., None], old - mean, 0).square().sum()
        _merge_moments(into["tokens"][1], into["input_moments"], count, mean, m2)
        into["tokens"] += torch.stack([angles.sum(), count])


def _count_into(counts: torch.Tensor, bins: torch.Tensor, mask: torch.Tensor) -> None:
    """Add the number of occurrences of each bin under a mask, of the shape of ``bins`` or of its rows."""
    weight = mask.to(counts.dtype)
    while weight.dim() < bins.dim():
        weight = weight.unsqueeze(-1)
    counts.scatter_add_(0, bins.reshape(-1), weight.expand(bins.shape).reshape(-1))


def _merge_moments(
    earlier: torch.Tensor, moments: torch.Tensor, count: torch.Tensor, mean: torch.Tensor, m2: torch.Tensor
) -> None:
    """Update ``moments`` [mean, m2] of ``earlier`` elements by ``count`` more (Chan), without a host transfer."""
    total = (earlier + count).clamp(min=1).double()
    delta = mean - moments[0]
    share = count / total
    change = torch.stack([delta * share, m2 + delta * delta * (earlier * share)])
    moments += torch.where(count > 0, change, 0)
