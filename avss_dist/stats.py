"""LayerStats: the mergeable state from which every score is computed. Pure numpy, float64 and int64.

Elementwise fields speak of *valid elements* (tokens x units, padding excluded) that are finite; per-token fields
leave out a token with a non-finite element, per-sequence fields a sequence with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]
LayerKey = tuple[int, str]

HISTOGRAM_BINS = 2048
HISTOGRAM_SHIFT = 20  # float32 pattern without its sign: 8 exponent bits and the top 3 mantissa bits stay
HISTOGRAM_EDGES: Float64 = np.append(
    (np.arange(HISTOGRAM_BINS - 8, dtype=np.uint32) << HISTOGRAM_SHIFT).view(np.float32).astype(np.float64), np.inf
)
"""Edges of the bins of abs(x) that finite values can reach: bin b is ``[edges[b], edges[b + 1])``. Shape [2041]."""


def histogram_bin(values: NDArray[np.floating]) -> Int64:
    """Bin of abs(x), exact: the upper bits of its float32 pattern. Same shape as ``values``."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(HISTOGRAM_SHIFT)).astype(np.int64)


def _empty_int() -> Int64:
    return np.zeros(0, np.int64)


def _empty_float() -> Float64:
    return np.zeros(0, np.float64)


def _empty_histogram() -> Int64:
    return np.zeros(HISTOGRAM_BINS, np.int64)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStats:
    """Sufficient statistics of one (layer, site). ``LayerStats.zero(thresholds)`` is the identity of `merge`.

    Attributes:
        thresholds: float64[k], ascending, absolute.
        count: finite valid elements.
        mean, m2: Welford/Chan moments over elements (Chan, Golub and LeVeque 1979).
        near_zero: int64[k], elements with abs(x) < threshold, strict, exact.
        zero_count: elements that are exactly zero.
        nonfinite_count: NaN and infinite elements, which no other field counts.
        min, max, max_abs: extremes; inf, -inf and 0 when count is 0.
        histogram: int64[2048] of abs(x), see `histogram_bin`.
        sequence_count, pooled_variance_sum: sum over sequences of the unbiased variance, over units, of the
            token-mean (the reading of the AVSS authors' released code).
        unit_count: tokens in the per-unit sums (block and update sites; else 0).
        unit_sum, unit_sum_sq: float64[units], or empty, as above.
        token_count: tokens with a defined angle, block input against output, whose difference did not overflow (block
            site; else 0).
        cosine_sum, angular_sum, relative_magnitude_sum: sums over tokens of cos(in, out), acos(cos) / pi and
            |out - in| / |in|.
        input_count, input_mean, input_m2: moments over elements of the block's input, for tokens that are finite in
            input and output (block site; else 0).
    """

    thresholds: Float64
    near_zero: Int64
    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    zero_count: int = 0
    nonfinite_count: int = 0
    min: float = np.inf
    max: float = -np.inf
    max_abs: float = 0.0
    histogram: Int64 = field(default_factory=_empty_histogram)
    sequence_count: int = 0
    pooled_variance_sum: float = 0.0
    unit_count: int = 0
    unit_sum: Float64 = field(default_factory=_empty_float)
    unit_sum_sq: Float64 = field(default_factory=_empty_float)
    token_count: int = 0
    cosine_sum: float = 0.0
    angular_sum: float = 0.0
    relative_magnitude_sum: float = 0.0
    input_count: int = 0
    input_mean: float = 0.0
    input_m2: float = 0.0

    @classmethod
    def zero(cls, thresholds: Iterable[float]) -> LayerStats:
        """The identity: statistics of nothing."""
        grid = np.asarray(tuple(thresholds), np.float64)
        return cls(thresholds=grid, near_zero=np.zeros(len(grid), np.int64))

    def merge(self, other: LayerStats) -> LayerStats:
        """Statistics of both samples together; neither input changes.

        Raises:
            ValueError: the two have other thresholds, or another number of units.
        """
        if not np.array_equal(self.thresholds, other.thresholds):
            raise ValueError(f"thresholds differ: {self.thresholds.tolist()} and {other.thresholds.tolist()}")
        count, mean, m2 = merge_moments((self.count, self.mean, self.m2), (other.count, other.mean, other.m2))
        input_count, input_mean, input_m2 = merge_moments(
            (self.input_count, self.input_mean, self.input_m2), (other.input_count, other.input_mean, other.input_m2)
        )
        added = {name: getattr(self, name) + getattr(other, name) for name in _ADDED}
        return LayerStats(
            thresholds=self.thresholds,
            count=count,
            mean=mean,
            m2=m2,
            input_count=input_count,
            input_mean=input_mean,
            input_m2=input_m2,
            min=min(self.min, other.min),
            max=max(self.max, other.max),
            max_abs=max(self.max_abs, other.max_abs),
            unit_sum=_add_units(self.unit_sum, other.unit_sum),
            unit_sum_sq=_add_units(self.unit_sum_sq, other.unit_sum_sq),
            **added,
        )

    def equals(self, other: LayerStats) -> bool:
        """Whether every field is identical to the last bit."""
        return all(np.array_equal(getattr(self, f.name), getattr(other, f.name), equal_nan=True) for f in fields(self))

    @property
    def variance(self) -> float:
        """Population variance over elements; NaN without elements."""
        return self.m2 / self.count if self.count else np.nan

    @property
    def rms(self) -> float:
        """Root mean square over elements; NaN without elements."""
        return float(np.sqrt(self.variance + self.mean**2))


_ADDED = (
    *("near_zero", "zero_count", "nonfinite_count", "histogram", "sequence_count", "pooled_variance_sum"),
    *("unit_count", "token_count", "cosine_sum", "angular_sum", "relative_magnitude_sum"),
)


def merge_moments(a: tuple[int, float, float], b: tuple[int, float, float]) -> tuple[int, float, float]:
    """Merge two (count, mean, m2) triples by Chan's pairwise update; an empty one is the identity."""
    (count_a, mean_a, m2_a), (count_b, mean_b, m2_b) = a, b
    if count_a == 0:
        return b
    if count_b == 0:
        return a
    count = count_a + count_b
    delta = mean_b - mean_a
    mean = mean_a + delta * (count_b / count)
    return count, mean, m2_a + m2_b + delta * delta * (count_a * (count_b / count))


def _add_units(a: Float64, b: Float64) -> Float64:
    if a.size == 0 or b.size == 0:
        return a if b.size == 0 else b
    if a.shape != b.shape:
        raise ValueError(f"unit counts differ: {a.size} and {b.size}")
    return a + b


def histogram_below(histogram: NDArray[np.int64], threshold: float) -> Float64:
    """Elements below ``threshold`` in histograms of shape [..., 2048]; the result has shape [...]."""
    if not threshold > 0:
        return np.zeros(histogram.shape[:-1])
    position = int(np.searchsorted(HISTOGRAM_EDGES, threshold, side="right")) - 1
    whole = histogram[..., :position].sum(axis=-1).astype(np.float64)
    if position >= len(HISTOGRAM_EDGES) - 1:
        return whole
    low, high = HISTOGRAM_EDGES[position : position + 2]
    share = (threshold - low) / (high - low) if np.isfinite(high) else 0.0
    return whole + share * histogram[..., position]


def stats_from_pattern_counts(counts: NDArray[np.integer], values: Float64, thresholds: Float64) -> dict[str, object]:
    """The elementwise fields of LayerStats from how often each value occurred, computed in float64.

    The counts of the 65,536 patterns of a 16-bit float are a sufficient statistic for every one of them.

    Args:
        counts: int32 or int64[n], how often each pattern occurred.
        values: float64[n], the value of each pattern, NaN and infinities included.
        thresholds: float64[k].
    """
    seen = np.flatnonzero(counts != 0)  # of a bool array: much faster
    counts, values = counts[seen].astype(np.int64), values[seen]
    finite = np.isfinite(values)
    nonfinite_count = int(counts[~finite].sum())
    counts, values = counts[finite], values[finite]
    count = int(counts.sum())
    sizes = np.abs(values)
    histogram = _empty_histogram()
    np.add.at(histogram, histogram_bin(values), counts)
    result: dict[str, object] = {
        "near_zero": np.array([counts[sizes < t].sum() for t in thresholds], np.int64),
        "zero_count": int(counts[sizes == 0].sum()),
        "nonfinite_count": nonfinite_count,
        "histogram": histogram,
        "count": count,
    }
    if count:
        mean = float((counts * values).sum() / count)
        result |= {
            "mean": mean,
            "m2": float((counts * (values - mean) ** 2).sum()),
            "min": float(values.min()),
            "max": float(values.max()),
            "max_abs": float(sizes.max()),
        }
    return result


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardResult:
    """What one shard's pass measured: pure, complete, counted once by its ``shard_id``.

    Attributes:
        shard_id: index of the shard in the corpus plan.
        content_hash: hash of the shard's tokens, as planned.
        layers: module path of every layer, in order.
        stats: LayerStats by (layer index, site).
        num_tokens: valid tokens observed.
        seconds: wall time of the pass.
        device: where it ran, such as ``cpu`` or ``NVIDIA H100``.
        model: what ran, JSON-ready: family, architecture, hidden_size, num_parameters, dtype, and so on.
        peak_memory_bytes: peak memory of the device (of the process on a CPU).
    """

    shard_id: int
    content_hash: str
    layers: tuple[str, ...]
    stats: Mapping[LayerKey, LayerStats]
    num_tokens: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    model: Mapping[str, Any] = field(default_factory=dict)
    peak_memory_bytes: int = 0


def merge_stats(parts: Iterable[Mapping[LayerKey, LayerStats]]) -> dict[LayerKey, LayerStats]:
    """Merge statistics by key, in the order given; a key may be missing from some parts."""
    merged: dict[LayerKey, LayerStats] = {}
    for part in parts:
        for key, stats in part.items():
            merged[key] = merged[key].merge(stats) if key in merged else stats
    return {key: merged[key] for key in sorted(merged)}


def merge_blocks(shards: Iterable[ShardResult], num_shards: int, most: int) -> list[dict[LayerKey, LayerStats]]:
    """Merge shards, given in the order of their ids, into at most ``most`` blocks of consecutive ones.

    Merging the blocks in order gives the run. Their number bounds memory, whatever the size of the corpus; they
    depend on ``num_shards`` alone, so the result does not depend on who measured what.

    Raises:
        ValueError: the ids are not exactly 0, 1, ..., num_shards - 1.
    """
    size = -(-num_shards // most)
    blocks: list[dict[LayerKey, LayerStats]] = []
    seen = -1
    for seen, shard in enumerate(shards):
        if shard.shard_id != seen:
            raise ValueError(f"shard {shard.shard_id} where shard {seen} belongs")
        if seen % size == 0:
            blocks.append({})
        blocks[-1] = merge_stats((blocks[-1], shard.stats))
    if seen + 1 != num_shards:
        raise ValueError(f"{seen + 1} shards where {num_shards} belong")
    return blocks
