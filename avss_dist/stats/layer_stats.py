"""Statistics from which every score is computed, and their merge: of layers, of rows of paired text, of experts.

Each field is annotated with its meaning, its unit if it has one, and the operation that merges it: the columns of the
warehouse and `LayerStats.merge` follow from these annotations.

Elementwise fields cover the finite *valid elements* (tokens x units, padding excluded). Per-token fields leave out
tokens with a non-finite element, per-sequence fields leave out sequences with one.
"""

from __future__ import annotations

import math
import operator
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, partial
from typing import Annotated, Any, NamedTuple, TypeVar, get_type_hints

import numpy as np
from numpy.typing import ArrayLike, NDArray

from avss_dist.core.values import TableRow
from avss_dist.corpus.labels import AFTER_ANOTHER

Int64 = NDArray[np.int64]
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
LayerKey = tuple[int, str]
StratumKey = tuple[int, str, str]
"""Layer, site and stratum. Unpaired text has one stratum with an empty name."""
BLOCK_BYTES = 128 << 20

Values = tuple[NDArray[np.float32], NDArray[np.int64]]  # abs(x), ascending, and how many elements have it

CUT_SHIFT = 16  # float32 pattern without its sign: its upper half stays, 8 exponent bits and 7 mantissa bits
CUTS = 1 << 15

HISTOGRAM_BINS = 2048
HISTOGRAM_SHIFT = 20  # float32 pattern without its sign: 8 exponent bits and the top 3 mantissa bits stay
_FINITE_BINS = HISTOGRAM_BINS - 8  # the patterns of the last 8 are those of infinity and NaN
_LOWEST_PATTERNS = np.arange(_FINITE_BINS, dtype=np.uint32) << HISTOGRAM_SHIFT
HISTOGRAM_EDGES: NDArray[np.float64] = np.append(_LOWEST_PATTERNS.view(np.float32).astype(np.float64), np.inf)
"""Edges of the bins of abs(x) that finite values can reach: bin b is ``[edges[b], edges[b + 1])``. Shape [2041]."""


def histogram_bin(values: NDArray[np.floating]) -> NDArray[np.int64]:
    """Return the histogram bin of each abs(x): the upper bits of its float32 pattern. Same shape as ``values``."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits & np.uint32(0x7FFFFFFF)) >> np.uint32(HISTOGRAM_SHIFT)).astype(np.int64)


def bin_edges(value: float) -> tuple[float, float]:
    """Return the lower and upper edge of the histogram bin of a value."""
    above = int(np.searchsorted(HISTOGRAM_EDGES, value, side="right"))
    upper = min(above, len(HISTOGRAM_EDGES) - 1)
    return float(HISTOGRAM_EDGES[upper - 1]), float(HISTOGRAM_EDGES[upper])


def histogram_below(histogram: NDArray[np.int64], threshold: float, share: float = 0.0) -> NDArray[np.float64]:
    """Return the number of elements below ``threshold`` in each histogram, float64[...].

    Args:
        histogram: int64[..., 2048].
        share: share below the threshold of the elements in its bin, 0 at an edge.
    """
    if not threshold > 0:
        return np.zeros(histogram.shape[:-1])
    position = int(np.searchsorted(HISTOGRAM_EDGES, threshold, side="right")) - 1
    in_lower_bins = histogram[..., :position].sum(axis=-1).astype(np.float64)
    return in_lower_bins + share * histogram[..., position]


def values_of_cuts(counts: NDArray[np.int64]) -> Values:
    """Return the values and counts of truncated float32 patterns.

    Args:
        counts: int64[32768], by the upper half of the pattern of abs(x).
    """
    present = np.flatnonzero(counts)
    patterns = present.astype(np.uint32) << np.uint32(CUT_SHIFT)
    return patterns.view(np.float32), counts[present]


def next_cut(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the next larger truncated value after each. Elements truncated to a value are below it."""
    bits = values.view(np.uint32) + np.uint32(1 << CUT_SHIFT)
    return bits.view(np.float32).astype(np.float64)


def merge_values(a: Values, b: Values) -> Values:
    """Return the counts by value over both samples."""
    a_values, a_counts = a
    b_values, b_counts = b
    if not b_values.size:
        return a
    if not a_values.size:
        return b
    values = np.concatenate([a_values, b_values])
    counts = np.concatenate([a_counts, b_counts])
    # A stable sort of two ascending runs merges them, in linear time.
    order = np.argsort(values, kind="stable")
    values = values[order]
    counts = counts[order]
    is_new = np.append(True, values[1:] != values[:-1])
    first = np.flatnonzero(is_new)
    return values[first], np.add.reduceat(counts, first)


def merge_moments(a: tuple[int, float, float], b: tuple[int, float, float]) -> tuple[int, float, float]:
    """Merge two (count, mean, m2) triples by Chan's pairwise update. An empty triple is the identity."""
    count_a, mean_a, m2_a = a
    count_b, mean_b, m2_b = b
    if count_a == 0:
        return b
    if count_b == 0:
        return a
    count = count_a + count_b
    weight_b = count_b / count
    delta = mean_b - mean_a
    mean = mean_a + delta * weight_b
    m2 = m2_a + m2_b + delta * delta * (count_a * weight_b)
    return count, mean, m2


def _add_units(a: Float64, b: Float64) -> Float64:
    if b.size == 0:
        return a
    if a.size == 0:
        return b
    if a.shape != b.shape:
        raise ValueError(f"unit counts differ: {a.size} and {b.size}")
    return a + b


# Operations that merge one field at a time: they take the values of all of their fields in both operands.
SUM = partial(map, operator.add)
MINIMUM = partial(map, min)
MAXIMUM = partial(map, max)
ANY = partial(map, operator.or_)
UNITS = partial(map, _add_units)
# Operations that merge a count, a mean and an m2 together. Each sample has an operation of its own, as fields with the
# same operation are merged together.
MOMENTS = partial(merge_moments)
INPUT_MOMENTS = partial(merge_moments)
FIRST_MOMENTS = partial(merge_moments)


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerStats:
    """Sufficient statistics of one (layer, site). ``LayerStats.zero(thresholds)`` is the identity of `merge`.

    Each field is a column of ``layer_stats``, described by its annotation. Arrays by threshold have k entries. Arrays
    by unit have an entry for each unit of the site, or none. ``histogram`` has 2048 bins, see `histogram_bin`. ``mean``
    and ``m2`` are merged by Chan, Golub and LeVeque (1979). The sums over tokens leave out tokens without a defined
    angle and those whose difference overflows. The moments of the block's input cover the tokens that are finite in
    input and output.
    ``first_count`` is 0 in files that were written before it was measured.
    """

    thresholds: Annotated[Float64, "absolute near-zero thresholds, ascending"]
    near_zero: Annotated[
        Int64,
        "elements with abs(x) < threshold, for each threshold, exact (site update: of differences as the dtype rounds "
        "them)",
        SUM,
    ]
    count: Annotated[int, "finite elements (tokens x units), padding excluded", MOMENTS] = 0
    mean: Annotated[float, "mean over elements", MOMENTS] = 0.0
    m2: Annotated[float, "sum over elements of (x - mean)^2; m2 / count is the variance", MOMENTS] = 0.0
    zero_count: Annotated[int, "elements that are exactly zero", SUM] = 0
    nonfinite_count: Annotated[int, "NaN and infinite elements, which no other column counts", SUM] = 0
    min: Annotated[float, "smallest element; inf without elements", MINIMUM] = np.inf
    max: Annotated[float, "largest element; -inf without elements", MAXIMUM] = -np.inf
    max_abs: Annotated[float, "largest abs(x)", MAXIMUM] = 0.0
    histogram: Annotated[Int64, "elements by bin of abs(x)", SUM] = field(
        default_factory=lambda: np.zeros(HISTOGRAM_BINS, np.int64)
    )
    abs_value: Annotated[Float32, "every distinct abs(x), ascending", merge_values] = field(
        default_factory=lambda: np.zeros(0, np.float32)
    )
    abs_value_count: Annotated[Int64, "elements with each of those values", merge_values] = field(
        default_factory=lambda: np.zeros(0, np.int64)
    )
    abs_value_cut: Annotated[bool, "whether those are float32 truncated to 16 bits: 128 values an octave", ANY] = False
    sequence_count: Annotated[int, "sequences in pooled_variance_sum", SUM] = 0
    pooled_variance_sum: Annotated[
        float, "sum over sequences of the unbiased variance, over units, of the mean over tokens", SUM
    ] = 0.0
    unit_count: Annotated[int, "tokens in unit_sum and unit_sum_sq (block and update sites)", SUM] = 0
    unit_sum: Annotated[Float64, "sum over tokens, by unit (block and update sites)", UNITS] = field(
        default_factory=lambda: np.zeros(0, np.float64)
    )
    unit_sum_sq: Annotated[Float64, "sum of squares over tokens, by unit (block and update sites)", UNITS] = field(
        default_factory=lambda: np.zeros(0, np.float64)
    )
    token_count: Annotated[int, "tokens in the three sums that follow (block site)", SUM] = 0
    cosine_sum: Annotated[float, "sum over tokens of the cosine of the block's input and output", SUM] = 0.0
    angular_sum: Annotated[float, "sum over tokens of the angle of the block's input and output", "pi radians", SUM] = (
        0.0
    )
    relative_magnitude_sum: Annotated[float, "sum over tokens of |output - input| / |input|", SUM] = 0.0
    input_count: Annotated[int, "elements of the block's input (block site)", INPUT_MOMENTS] = 0
    input_mean: Annotated[float, "mean over elements of the block's input", INPUT_MOMENTS] = 0.0
    input_m2: Annotated[float, "sum over elements of the block's input of (x - input_mean)^2", INPUT_MOMENTS] = 0.0
    first_count: Annotated[int, "elements of the first token that counts in each row (block site)", FIRST_MOMENTS] = 0
    first_mean: Annotated[float, "mean over those elements", FIRST_MOMENTS] = 0.0
    first_m2: Annotated[float, "sum over those elements of (x - first_mean)^2", FIRST_MOMENTS] = 0.0

    @classmethod
    def zero(cls, thresholds: Iterable[float]) -> LayerStats:
        """Return the statistics of an empty sample, the identity of `merge`."""
        grid = np.asarray(tuple(thresholds), np.float64)
        return cls(thresholds=grid, near_zero=np.zeros(len(grid), np.int64))

    def merge(self, other: LayerStats) -> LayerStats:
        """Return the statistics over the elements of both operands, which do not change.

        Raises:
            ValueError: if the operands differ in their thresholds or in their number of units.
        """
        if not np.array_equal(self.thresholds, other.thresholds):
            raise ValueError(f"thresholds differ: {self.thresholds.tolist()} and {other.thresholds.tolist()}")
        merged: dict[str, Any] = {"thresholds": self.thresholds}
        for operation, names in MERGED_FIELDS.items():
            own_values = [getattr(self, name) for name in names]
            other_values = [getattr(other, name) for name in names]
            values = operation(own_values, other_values)
            merged.update(zip(names, values, strict=True))
        return LayerStats(**merged)

    def equals(self, other: LayerStats) -> bool:
        """Whether every field is identical to the last bit."""
        for described in fields(self):
            own = getattr(self, described.name)
            others = getattr(other, described.name)
            if not np.array_equal(own, others, equal_nan=True):
                return False
        return True

    @property
    def bins(self) -> tuple[Float64, Float64, Int64]:
        """Lower bounds, upper bounds and counts of the counted values of abs(x), ascending."""
        lows = self.abs_value.astype(np.float64)
        highs = lows
        if self.abs_value_cut:
            highs = next_cut(self.abs_value)
        return lows, highs, self.abs_value_count

    def below(self, threshold: float) -> tuple[float, float, float]:
        """Return the number of elements with abs(x) < ``threshold``, 0 if it is NaN, and the bounds of this number.

        The number is exact at counted thresholds and at the bounds of `bins`. Elsewhere it is interpolated linearly,
        between a lower and an upper bound that differ.
        """
        counted = np.flatnonzero(self.thresholds == threshold)
        if counted.size:
            exact = float(self.near_zero[counted[0]])
            return exact, exact, exact
        if not threshold > 0:
            return 0.0, 0.0, 0.0
        lows, highs, counts = self.bins
        # Number of bins that begin below the threshold. It may lie inside the last one of them.
        started = np.searchsorted(lows, threshold)
        at_most = float(counts[:started].sum())
        if not started or highs[started - 1] <= threshold:
            return at_most, at_most, at_most
        at_least = float(counts[: started - 1].sum())
        low_edge = lows[started - 1]
        high_edge = highs[started - 1]
        share = float((threshold - low_edge) / (high_edge - low_edge))
        return at_least + share * (at_most - at_least), at_least, at_most

    def share_below(self, threshold: float) -> float:
        """Return the share below a threshold of the elements in its histogram bin, or 0 if the bin is empty."""
        low_edge, high_edge = bin_edges(threshold)
        below_bin = float(histogram_below(self.histogram, low_edge))
        below_next_bin = float(histogram_below(self.histogram, high_edge))
        if not below_next_bin > below_bin:
            return 0.0
        below, _, _ = self.below(threshold)
        return (below - below_bin) / (below_next_bin - below_bin)

    @property
    def variance(self) -> float:
        """Population variance over elements. NaN without elements."""
        return self.m2 / self.count if self.count else np.nan

    @property
    def rms(self) -> float:
        """Root mean square over elements. NaN without elements."""
        return float(np.sqrt(self.variance + self.mean**2))


class FieldAnnotation(NamedTuple):
    """Annotation of a field of statistics.

    Attributes:
        type: type of the values.
        texts: meaning, and unit if it has one.
        operation: operation that merges the field; None if it is not merged. It takes the values of both operands.
    """

    type: type
    texts: tuple[str, ...]
    operation: Callable[..., Iterable[object]] | None


@cache
def annotations_of(cls: type) -> dict[str, FieldAnnotation]:
    """Return the annotation of each annotated field of a class. Fields with the same operation are merged together."""
    annotations = {}
    for name, hint in get_type_hints(cls, include_extras=True).items():
        texts = tuple(part for part in hint.__metadata__ if isinstance(part, str))
        operations = [part for part in hint.__metadata__ if callable(part)]
        operation = operations[0] if operations else None
        annotations[name] = FieldAnnotation(hint.__origin__, texts, operation)
    return annotations


def _fields_by_operation() -> dict[Callable[..., Iterable[object]], list[str]]:
    by_operation: dict[Callable[..., Iterable[object]], list[str]] = {}
    for name, annotation in annotations_of(LayerStats).items():
        if annotation.operation:
            by_operation.setdefault(annotation.operation, []).append(name)
    return by_operation


MERGED_FIELDS = _fields_by_operation()
"""Fields of LayerStats by the operation that merges them."""


def share_of_m2(part: tuple[ArrayLike, ArrayLike, ArrayLike], mean: ArrayLike, m2: ArrayLike) -> Float64:
    """Return the share of a sample's ``m2`` that a part contributes, NaN if the part is empty or m2 is 0.

    Args:
        part: count, mean and m2 of the part. Arrays are of several samples.
        mean, m2: mean and m2 of the whole sample.
    """
    arrays = [np.asarray(values, np.float64) for values in (*part, mean, m2)]
    count, part_mean, part_m2, whole_mean, whole_m2 = np.broadcast_arrays(*arrays)
    contributed = part_m2 + count * (part_mean - whole_mean) ** 2
    defined = (count > 0) & (whole_m2 > 0)
    return np.divide(contributed, whole_m2, out=np.full(contributed.shape, np.nan), where=defined)


def stats_from_pattern_counts(counts: NDArray[np.integer], values: Float64, thresholds: Float64) -> dict[str, object]:
    """Return the elementwise fields of LayerStats from the counts of each value, computed in float64.

    The counts of the 65,536 patterns of a 16-bit float are a sufficient statistic for each of these fields.

    Args:
        counts: int32 or int64[2 n], the number of occurrences of each pattern.
        values: float64[2 n], the value of each pattern, including NaN and infinities. The first n values ascend from 0,
            the others are their negatives.
        thresholds: float64[k], the absolute near-zero thresholds.
    """
    positive, negative = counts.reshape(2, -1)
    num_finite = int(np.searchsorted(values[: len(positive)], np.inf))
    # Both signs of a value are added up at one place, so that the values ascend without being sorted.
    by_size = positive[:num_finite] + negative[:num_finite]
    # numpy finds the positions in an array of booleans much faster than in one of numbers.
    present = np.flatnonzero(by_size != 0)
    sizes = values[present]
    abs_value = sizes.astype(np.float32)
    abs_value_count = by_size[present].astype(np.int64)
    below = np.append(0, np.cumsum(abs_value_count))
    count = int(below[-1])
    histogram = np.bincount(histogram_bin(abs_value), abs_value_count, HISTOGRAM_BINS)
    result: dict[str, object] = {
        "nonfinite_count": int(positive[num_finite:].sum() + negative[num_finite:].sum()),
        "abs_value": abs_value,
        "abs_value_count": abs_value_count,
        "count": count,
        "near_zero": below[np.searchsorted(sizes, thresholds)],
        "zero_count": int(by_size[0]),
        "histogram": histogram.astype(np.int64),
    }
    if count:
        by_sign = np.concatenate([positive[present], negative[present]])
        occurs = by_sign != 0
        numbers = by_sign[occurs].astype(np.int64)
        signed = np.concatenate([sizes, -sizes])[occurs]
        mean = float((numbers * signed).sum() / count)
        result["mean"] = mean
        result["m2"] = float((numbers * (signed - mean) ** 2).sum())
        result["min"] = float(np.min(signed))
        result["max"] = float(np.max(signed))
        result["max_abs"] = float(abs_value[-1])
    return result


RowStats = Mapping[str, NDArray[Any]]
"""Statistics of one layer and site by name, an entry for each row, over the tokens of its answer.

The sums of ``count`` and ``near_zero`` over the rows of a stratum equal those of its LayerStats.
"""

ROW_FIELDS = {
    "count": "finite elements of the answer (tokens x units)",
    "near_zero": "elements with abs(x) < threshold, for each threshold of the run, exact (site update: of differences "
    "as the dtype rounds them)",
    "mean": "mean over elements",
    "m2": "sum over elements of (x - mean)^2; m2 / count is the variance",
    "pooled_variance": "unbiased variance, over units, of the mean over tokens",
    "norm": "mean over tokens of |x|",
    "relative_magnitude": "mean over tokens of |output - input| / |input| (block site)",
}
"""Meaning of each of the `RowStats`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ExpertStats:
    """Sums of the experts of a layer, one entry for each expert, including those that no token reached.

    ``gated_norm_sum / routed_tokens`` is the saliency of REAP (Lasby et al., arXiv 2510.13999, equation 9). The output
    of an expert is taken at a gate of 1. Tokens with a non-finite output count only in the first two sums.
    """

    routed_tokens: Annotated[Int64, "tokens that the router gave to the expert"]
    gate_sum: Annotated[Float64, "sum over those tokens of the gate: what the expert's output is multiplied by"]
    gated_norm_sum: Annotated[Float64, "sum over those tokens of gate * |output|"]
    output_count: Annotated[Int64, "elements of the expert's outputs (tokens x units)"]
    output_sum: Annotated[Float64, "sum over those elements"]
    output_sum_sq: Annotated[Float64, "sum of their squares"]
    token_count: Annotated[Int64, "tokens that the router of the layer saw; the same for each of its experts"]
    router_entropy_sum: Annotated[
        Float64, "sum over those tokens of the entropy of the router's softmax; the same for each expert", "nats"
    ]

    def merge(self, other: ExpertStats) -> ExpertStats:
        """Return the statistics over the tokens of both operands."""
        sums = {}
        for name in EXPERT_FIELDS:
            sums[name] = getattr(self, name) + getattr(other, name)
        return ExpertStats(**sums)


EXPERT_FIELDS = tuple(described.name for described in fields(ExpertStats))


@dataclass(frozen=True, eq=False, kw_only=True)
class ShardResult:
    """Complete statistics of one shard, identified by its ``shard_id``.

    Attributes:
        shard_id: index of the shard in the corpus plan.
        content_hash: hash of the shard's tokens, as planned.
        layers: module path of every layer, in order.
        strata: LayerStats by (layer index, site, stratum).
        rows: columns of ``row_stats`` for paired text, a value for each layer, site and row in order, else None.
        experts: statistics of routed experts by layer, or None if they were not measured. For paired text, they cover
            all answers after their own prompts.
        num_tokens: valid tokens observed.
        seconds: wall time of the pass.
        device: name of the device, such as ``cpu`` or ``NVIDIA H100``.
        model: JSON-ready description of the model: family, architecture, hidden_size, num_parameters, dtype, and so on.
        peak_memory_bytes: peak memory of all devices together, or of the process on a CPU.
    """

    shard_id: int
    content_hash: str
    layers: tuple[str, ...]
    strata: Mapping[StratumKey, LayerStats]
    num_tokens: int = 0
    seconds: float = 0.0
    device: str = "cpu"
    model: TableRow = field(default_factory=dict)
    peak_memory_bytes: int = 0
    rows: RowStats | None = None
    experts: Mapping[int, ExpertStats] | None = None

    @property
    def stats(self) -> dict[LayerKey, LayerStats]:
        """LayerStats by (layer index, site). For paired text, they cover all answers after their own prompts."""
        return merge_strata(self.strata)


def without_values(stats: LayerStats) -> LayerStats:
    """Return statistics without the counts by value, which take most of their memory."""
    return replace(stats, abs_value=np.zeros(0, np.float32), abs_value_count=np.zeros(0, np.int64))


Key = TypeVar("Key", LayerKey, StratumKey, int)
Stats = TypeVar("Stats", LayerStats, ExpertStats)


def merge_stats(parts: Iterable[Mapping[Key, Stats]]) -> dict[Key, Stats]:
    """Merge statistics by key, in the order of the parts. A key may be missing from some parts."""
    merged: dict[Key, Stats] = {}
    for part in parts:
        for key, stats in part.items():
            if key in merged:
                merged[key] = merged[key].merge(stats)
            else:
                merged[key] = stats
    return {key: merged[key] for key in sorted(merged)}


def merge_strata(strata: Mapping[StratumKey, LayerStats]) -> dict[LayerKey, LayerStats]:
    """Merge the strata of all labels into statistics by (layer, site). Answers after another prompt are left out."""
    by_label: dict[str, dict[LayerKey, LayerStats]] = {}
    for layer, site, label in sorted(strata):
        if not label.endswith(AFTER_ANOTHER):
            by_label.setdefault(label, {})[layer, site] = strata[layer, site, label]
    return merge_stats(by_label.values())


@dataclass(frozen=True)
class Merged:
    """Merged statistics of a run. They depend only on the shards, whichever process merged which block of them.

    Attributes:
        stats: statistics of the run, with counts by value.
        blocks: statistics of each block of consecutive shards, without counts by value.
        strata: statistics of the run by stratum for paired text, else empty.
    """

    stats: dict[LayerKey, LayerStats]
    blocks: list[Mapping[LayerKey, LayerStats]]
    strata: dict[StratumKey, LayerStats]


def split_into_blocks(num_shards: int, maximum: int) -> list[range]:
    """Return the shard ids of each block, for at most ``maximum`` blocks.

    The limit bounds memory, whatever the size of the corpus.
    """
    size = max(1, math.ceil(num_shards / maximum))
    return [range(start, min(start + size, num_shards)) for start in range(0, num_shards, size)]


def combine_blocks(blocks: Iterable[Mapping[StratumKey, LayerStats]]) -> Merged:
    """Merge blocks, in the order given.

    At most `BLOCK_BYTES` of the large arrays of blocks stay in memory. Further ones are mapped from temporary files.
    """
    block_stats: list[Mapping[LayerKey, LayerStats]] = []
    strata: dict[StratumKey, LayerStats] = {}
    room = BLOCK_BYTES
    for block in blocks:
        stats = merge_strata({key: without_values(layer_stats) for key, layer_stats in block.items()})
        room -= sum(array.nbytes for array in _large_arrays(stats))
        if room < 0:
            stats = _mapped(stats)
        block_stats.append(stats)
        strata = merge_stats((strata, block))
    merged = merge_strata(strata)
    is_paired = any(label for _, _, label in strata)
    if not is_paired:
        strata = {}
    return Merged(stats=merged, blocks=block_stats, strata=strata)


def _large_arrays(stats: Mapping[LayerKey, LayerStats]) -> list[NDArray[Any]]:
    """Return three arrays for each layer and site, in order: the histogram, and the sums by unit."""
    arrays: list[NDArray[Any]] = []
    for layer_stats in stats.values():
        arrays += [layer_stats.histogram, layer_stats.unit_sum, layer_stats.unit_sum_sq]
    return arrays


def _mapped(stats: dict[LayerKey, LayerStats]) -> dict[LayerKey, LayerStats]:
    """Return the same statistics with their large arrays in one memory-mapped file, which has no name.

    If the file cannot be written, they stay in memory.
    """
    arrays = _large_arrays(stats)
    try:
        with tempfile.TemporaryFile() as file:
            file.writelines(array.tobytes() for array in arrays)
            file.flush()
            whole = np.asarray(np.memmap(file, np.int64, "r"))
    except (OSError, ValueError):  # numpy raises ValueError for an empty file
        return stats
    ends = np.cumsum([array.size for array in arrays])
    pieces = iter(np.split(whole, ends[:-1]))
    mapped = {}
    for key, layer_stats in stats.items():
        mapped[key] = replace(
            layer_stats,
            histogram=next(pieces),
            unit_sum=next(pieces).view(np.float64),
            unit_sum_sq=next(pieces).view(np.float64),
        )
    return mapped


def merge_blocks(shards: Sequence[ShardResult], maximum: int) -> Merged:
    """Merge shards in at most ``maximum`` blocks, given in the order of their ids."""
    return combine_blocks(_each_block(shards, maximum))


def _each_block(shards: Sequence[ShardResult], maximum: int) -> Iterator[dict[StratumKey, LayerStats]]:
    for ids in split_into_blocks(len(shards), maximum):
        block = shards[ids.start : ids.stop]
        yield merge_stats(shard.strata for shard in block)
