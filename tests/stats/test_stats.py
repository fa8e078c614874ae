"""Statistics: merges, the histogram, counts of 16-bit patterns, blocks of shards, strata, rows and experts."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.oracle import By, Float64, assert_close, oracle_bins, oracle_cuts, oracle_stats

from avss_dist.core.thresholds import THRESHOLDS
from avss_dist.corpus.labels import AFTER_ANOTHER
from avss_dist.stats import layer_stats
from avss_dist.stats.layer_stats import (
    CUTS,
    EXPERT_FIELDS,
    HISTOGRAM_BINS,
    HISTOGRAM_EDGES,
    ExpertStats,
    LayerStats,
    ShardResult,
    StratumKey,
    bin_edges,
    combine_blocks,
    histogram_below,
    histogram_bin,
    merge_blocks,
    merge_moments,
    merge_stats,
    merge_strata,
    next_cut,
    stats_from_pattern_counts,
    values_of_cuts,
    without_values,
)

GRID = np.array(THRESHOLDS)
UNITS = 3
TINIEST = np.float32(1e-45)
LARGEST = np.finfo(np.float32).max
ODDITIES = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-5, 1e4, TINIEST, -LARGEST])
laws = settings(max_examples=30, derandomize=True)


class Sample:
    """Activations x[sequences, tokens, units] with a mask, a block input, and NaN, inf and outliers in both.

    Every other one is counted by value, as 16-bit activations are, the others as float32 ones.
    """

    def __init__(self, seed: int, sequences: int = 6, tokens: int = 4, oddities: float = 0.05) -> None:
        rng = np.random.default_rng(seed)
        self.by: By = "cut" if seed % 2 else "value"
        shape = (sequences, tokens, UNITS)
        self.before = self._values(rng, shape, oddities)
        self.x = self._values(rng, shape, oddities)
        self.mask = rng.random(shape[:2]) < 0.8

    @staticmethod
    def _values(rng: np.random.Generator, shape: tuple[int, ...], oddities: float) -> np.ndarray:
        values = rng.normal(size=shape) * 10.0 ** rng.integers(-6, 4, shape)
        is_odd = rng.random(shape) < oddities
        return np.where(is_odd, rng.choice(ODDITIES, shape), values).astype(np.float32)

    def stats(self, rows: Sequence[int] | slice = slice(None)) -> LayerStats:
        x = self.x[rows].astype(np.float64)
        before = self.before[rows].astype(np.float64)
        return oracle_stats(x, self.mask[rows], GRID, units=True, by=self.by, before=before, first_tokens=True)


def sampled(seed: int) -> LayerStats:
    return Sample(seed, sequences=seed % 4, tokens=1 + seed % 3).stats()


any_stats = st.integers(0, 10**6).map(sampled)


def make_shard(shard_id: int, stats: LayerStats | None = None) -> ShardResult:
    stats = stats or sampled(1001 + 3 * shard_id)
    return ShardResult(shard_id=shard_id, content_hash="", layers=("a",), strata={(0, "block", ""): stats})


@laws
@given(any_stats)
def test_zero_is_the_identity_to_the_last_bit(stats: LayerStats) -> None:
    zero = LayerStats.zero(THRESHOLDS)
    assert stats.merge(zero).equals(stats)
    assert zero.merge(stats).equals(stats)
    assert zero.merge(zero).equals(zero)


@laws
@given(any_stats, any_stats)
def test_merge_leaves_its_inputs_alone(a: LayerStats, b: LayerStats) -> None:
    before = pickle.loads(pickle.dumps((a, b)))
    merged = a.merge(b)
    merged.near_zero[:] += 1
    merged.histogram[:] += 1
    assert a.equals(before[0])
    assert b.equals(before[1])


@laws
@given(st.integers(0, 10**6), st.permutations(range(6)), st.integers(1, 6))
def test_any_split_and_shuffle_equals_the_whole(seed: int, order: list[int], parts: int) -> None:
    sample = Sample(seed)
    merged = LayerStats.zero(THRESHOLDS)
    for part in range(parts):
        merged = merged.merge(sample.stats(order[part::parts]))
    assert_close(merged, sample.stats(), angle_atol=1e-8)


def test_merge_refuses_other_thresholds_and_another_number_of_units() -> None:
    with pytest.raises(ValueError, match="thresholds differ"):
        LayerStats.zero((1e-5,)).merge(LayerStats.zero((1e-4,)))
    zero = LayerStats.zero(THRESHOLDS)
    two = replace(zero, unit_sum=np.ones(2), unit_sum_sq=np.ones(2))
    three = replace(zero, unit_sum=np.ones(3), unit_sum_sq=np.ones(3))
    with pytest.raises(ValueError, match="unit counts differ: 2 and 3"):
        two.merge(three)


def test_merge_counts_exactly_beyond_float_and_int32() -> None:
    huge = 2**60 + 1
    stats = replace(LayerStats.zero(THRESHOLDS), count=huge, mean=1.0, m2=2.0, near_zero=np.full(len(GRID), huge))
    merged = stats.merge(replace(stats, mean=3.0))
    assert merged.count == 2 * huge
    assert (merged.near_zero == 2 * huge).all()
    assert merged.mean == 2.0
    assert merged.m2 == pytest.approx(2.0 * huge, rel=1e-12)


def moments_of(values: Float64) -> tuple[int, float, float]:
    """Return number, mean and sum of squared deviations; of nothing they are zero."""
    if not values.size:
        return (0, 0.0, 0.0)
    return (values.size, float(values.mean()), float(values.size * values.var()))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 1), (3, 4)])
def test_moments_of_few_elements_are_those_of_all(sizes: tuple[int, int]) -> None:
    first, second = sizes
    a = np.random.default_rng(first).normal(5.0, 2.0, first)
    b = np.random.default_rng(second).normal(5.0, 2.0, second)
    expected = moments_of(np.append(a, b))
    assert merge_moments(moments_of(a), moments_of(b)) == pytest.approx(expected, rel=1e-12)


def test_moments_of_a_trillion_elements_are_exact() -> None:
    trillion = 2**40
    merged = merge_moments((trillion, 5.0, 1.0 * trillion), (trillion, 7.0, 3.0 * trillion))
    assert merged == (2 * trillion, 6.0, 6.0 * trillion)


def test_equals_sees_every_field() -> None:
    stats = Sample(8).stats()
    for name, value in vars(stats).items():
        changed = replace(stats, **{name: value + 1})
        assert not changed.equals(stats), name


def test_nan_equals_nan_alone() -> None:
    stats = Sample(8).stats()
    unknown = replace(stats, mean=np.nan)
    assert unknown.equals(replace(stats, mean=np.nan))
    assert not unknown.equals(stats)


def test_variance_and_rms_are_those_of_the_elements() -> None:
    sample = Sample(3, oddities=0)
    elements = sample.x[sample.mask].astype(np.float64)
    stats = sample.stats()
    assert stats.variance == pytest.approx(elements.var(), rel=1e-12)
    assert stats.rms == pytest.approx(np.sqrt((elements**2).mean()), rel=1e-12)


def test_variance_and_rms_of_nothing_are_no_numbers() -> None:
    zero = LayerStats.zero(THRESHOLDS)
    assert np.isnan(zero.variance)
    assert np.isnan(zero.rms)


def test_bins_change_exactly_at_their_edges() -> None:
    edges = HISTOGRAM_EDGES[:-1].astype(np.float32)
    assert np.array_equal(edges.astype(np.float64), HISTOGRAM_EDGES[:-1])
    bins = np.arange(len(edges))
    assert np.array_equal(histogram_bin(edges), bins)
    assert np.array_equal(histogram_bin(-edges), bins)
    below_edges = np.nextafter(edges[1:], np.float32(0))
    assert np.array_equal(histogram_bin(below_edges), bins[:-1])


def random_patterns() -> np.ndarray:
    """Return the bits of float32 numbers of every size."""
    return np.random.default_rng(0).integers(0, 0x7F800000, 10_000, dtype=np.uint32)


def test_bins_equal_eight_an_octave() -> None:
    values = random_patterns().view(np.float32)
    assert np.array_equal(histogram_bin(values), oracle_bins(values.astype(np.float64)))


def random_histogram(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    histogram = np.zeros((*shape, HISTOGRAM_BINS), np.int64)
    histogram[..., :2040] = rng.integers(1, 1000, (*shape, 2040))
    return histogram


def test_histogram_below_is_exact_at_every_edge() -> None:
    histogram = random_histogram()
    below = [histogram_below(histogram, edge) for edge in HISTOGRAM_EDGES]
    assert np.array_equal(below, np.append(0, histogram[:2040].cumsum()))


@pytest.mark.parametrize("threshold", [0.0, -1.0, np.nan])
def test_nothing_is_below_what_is_not_positive(threshold: float) -> None:
    assert histogram_below(random_histogram(), threshold, 0.5) == 0
    assert histogram_below(random_histogram(2, 3), threshold).shape == (2, 3)


@pytest.mark.parametrize("position", [0, 7, 8, 1016, 2038])
@pytest.mark.parametrize("share", [0.125, 0.5, 0.75])
def test_histogram_below_takes_a_given_share_of_a_bin(position: int, share: float) -> None:
    histogram = random_histogram()
    low, high = HISTOGRAM_EDGES[position : position + 2]
    threshold = low + share * (high - low)
    expected = histogram[:position].sum() + share * histogram[position]
    assert histogram_below(histogram, threshold, share) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("position", [0, 7, 8, 1016, 2038, 2039])
def test_a_threshold_inside_a_bin_lies_between_its_edges(position: int) -> None:
    histogram = random_histogram()
    low, high = HISTOGRAM_EDGES[position : position + 2]
    inside = np.nextafter(low, np.inf) * 1.01
    lowest_inside = low if position else 0.0
    assert bin_edges(inside) == (low, high)
    assert bin_edges(lowest_inside) == (low, high)
    expected = histogram[:position].sum() + 0.25 * histogram[position]
    assert histogram_below(histogram, inside, 0.25) == expected
    assert histogram_below(histogram, np.inf, 0.25) == histogram.sum()


def of_values(values: Float64, by: By, thresholds: Float64 = GRID) -> LayerStats:
    mask = np.ones((1, len(values)), bool)
    return oracle_stats(values[None, :, None], mask, thresholds, by=by)


def coarse_values() -> Float64:
    """Return sums on a coarse grid, as those of 16-bit numbers are, 0.03125 apart."""
    return np.round(np.random.default_rng(0).normal(size=5000) * 32) / 32


@pytest.mark.parametrize("threshold", [0.0, 1e-45, 1e-3, 0.0301, 0.6875, 0.7, 40.0, 1e300, np.inf, np.nan, -1.0])
def test_below_any_threshold_is_exact_where_values_are_counted(threshold: float) -> None:
    """Bins of 0.0301 and 0.7 hold little else than one value of the coarse grid."""
    values = coarse_values()
    is_below = np.abs(values) < threshold
    exact = is_below.sum()
    assert of_values(values, "value").below(threshold) == (exact, exact, exact)


@pytest.fixture
def patterns() -> np.ndarray:
    """Bits of float32 numbers of every size, the smallest and the largest among them."""
    patterns = random_patterns()
    patterns[:3] = 0, 1, 0x7F7FFFFF
    return patterns


def cuts_of(patterns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cuts of numbers, and the times that each occurs."""
    counts = np.zeros(CUTS, np.int64)
    np.add.at(counts, patterns >> 16, 1)
    return values_of_cuts(counts)


def test_cuts_are_counted_by_their_pattern(patterns: np.ndarray) -> None:
    cuts, times = cuts_of(patterns)
    values = patterns.view(np.float32).astype(np.float64)
    expected, expected_times = np.unique(oracle_cuts(values), return_counts=True)
    assert cuts.dtype == np.float32
    assert np.array_equal(cuts, expected)
    assert np.array_equal(times, expected_times)


def test_cuts_are_eight_significant_bits_of_every_size(patterns: np.ndarray) -> None:
    cuts, _ = cuts_of(patterns)
    *ends, last = next_cut(cuts)
    assert (ends <= cuts[1:]).all()
    assert last == np.inf
    starts = cuts[:-1]
    widths = np.log2(next_cut(starts) - starts)
    exponents = np.floor(np.log2(np.maximum(starts, 2.0**-126)))
    assert np.unique(widths - exponents).tolist() == [-7]


@pytest.mark.parametrize("threshold", [0.0301, 0.7])
def test_below_a_counted_threshold_is_what_was_counted(threshold: float) -> None:
    values = np.random.default_rng(0).normal(size=5000)
    counted = of_values(values, "cut", thresholds=np.array([0.0301, 0.7]))
    is_below = np.abs(values) < threshold
    exact = is_below.sum()
    assert counted.below(threshold) == (exact, exact, exact)


@pytest.mark.parametrize("by", ["value", "cut"])
@pytest.mark.parametrize("threshold", [1e-3, 0.0301, 0.6875, 0.7, 100.0])
def test_shares_below_a_cut_add_up_to_the_whole(by: By, threshold: float) -> None:
    stats = of_values(coarse_values(), by)
    below, _, _ = stats.below(threshold)
    share = stats.share_below(threshold)
    assert histogram_below(stats.histogram, threshold, share) == pytest.approx(below, rel=1e-12)


def test_the_share_of_nothing_below_a_cut_is_zero() -> None:
    assert LayerStats.zero(THRESHOLDS).share_below(0.3) == 0


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.5, (0, 0, 0)),
        (1.0, (0, 0, 0)),
        (1.00390625, (2, 0, 4)),
        (1.0078125, (4, 4, 4)),
        (1.5, (4, 4, 4)),
        (2.0, (4, 4, 4)),
        (2.00390625, (4.5, 4, 6)),
        (2.015625, (6, 6, 6)),
        (3.0078125, (10, 6, 14)),
        (100.0, (14, 14, 14)),
        (np.inf, (14, 14, 14)),
    ],
)
def test_below_is_linear_between_the_bounds_of_the_value_that_is_cut(
    threshold: float, expected: tuple[float, float, float]
) -> None:
    """The cuts 1, 2 and 3 hold 4, 2 and 8 elements. They end at 1 + 1/128, 2 + 1/64 and 3 + 1/64."""
    values = np.array([1, 2, 3], np.float32)
    counts = np.array([4, 2, 8])
    zero = LayerStats.zero((7.0,))
    stats = replace(zero, abs_value=values, abs_value_count=counts, abs_value_cut=True, count=14)
    assert stats.below(threshold) == expected


def float16_values() -> Float64:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float64)


def bfloat16_values() -> Float64:
    return (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # signalling NaN patterns
@pytest.mark.parametrize("table", [float16_values, bfloat16_values])
@pytest.mark.parametrize("size", [0, 1, 50_000])
def test_pattern_counts_suffice_for_every_elementwise_field(table: Callable[[], Float64], size: int) -> None:
    values = table()
    patterns = np.random.default_rng(0).integers(0, 1 << 16, size)
    patterns[: size // 4] = 0x8000  # -0.0
    counts = np.bincount(patterns, minlength=1 << 16)
    actual = LayerStats(thresholds=GRID, **stats_from_pattern_counts(counts, values, GRID))  # type: ignore[arg-type]
    expected = oracle_stats(values[patterns][None, :, None], np.ones((1, size), bool), GRID, by="value")
    if size == 50_000:
        assert actual.nonfinite_count > 0
        assert actual.zero_count >= size // 4
    assert_close(actual, replace(expected, sequence_count=0))


def test_pattern_counts_of_nonfinite_values_alone_are_empty_statistics() -> None:
    values = float16_values()
    counts = np.where(np.isfinite(values), 0, 3)
    fields = stats_from_pattern_counts(counts, values, GRID)
    expected = replace(LayerStats.zero(THRESHOLDS), nonfinite_count=3 * 2048)
    assert LayerStats(thresholds=GRID, **fields).equals(expected)  # type: ignore[arg-type]


def test_pattern_counts_may_exceed_int32_and_thresholds_are_strict() -> None:
    counts = np.array([0, 2**40, 2**40, 0])
    values = np.array([1.0, 3.0, -1.0, -3.0])
    fields = stats_from_pattern_counts(counts, values, thresholds=np.array([1.0, 3.0]))
    assert fields["count"] == 2**41
    assert fields["mean"] == 1.0
    assert fields["m2"] == 4.0 * 2**41
    assert fields["near_zero"].tolist() == [0, 2**40]  # type: ignore[attr-defined]


@laws
@given(st.integers(0, 40), st.integers(1, 12))
@example(5, 5)
def test_blocks_are_bounded_and_merge_into_the_run(num_shards: int, most: int) -> None:
    shards = [make_shard(i) for i in range(num_shards)]
    merged_blocks = merge_blocks(shards, most)
    merged = merged_blocks.stats
    blocks = merged_blocks.blocks
    size = -(-num_shards // most)
    assert len(blocks) <= most
    assert num_shards > most or len(blocks) == num_shards, "few shards are a block each"
    for i, block in enumerate(blocks):
        expected = merge_stats(shard.stats for shard in shards[i * size : (i + 1) * size])
        assert block[0, "block"].equals(without_values(expected[0, "block"]))
    run = merge_stats(shard.stats for shard in shards)
    assert merged.keys() == run.keys()
    for key in run:
        assert_close(merged[key], run[key])
        assert without_values(merged[key]).equals(merge_stats(blocks)[key])


LABELS = ("right", "wrong")


def stratum(seed: int) -> LayerStats:
    x = np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32).astype(np.float64)
    return oracle_stats(x, np.ones((2, 3), bool), GRID, units=True)


def paired_shard(shard_id: int, labels: Sequence[str] = LABELS) -> ShardResult:
    strata: dict[StratumKey, LayerStats] = {}
    after_another = [label + AFTER_ANOTHER for label in labels]
    for number, label in enumerate([*labels, *after_another]):
        for layer in range(2):
            strata[layer, "mlp", label] = stratum(100 * shard_id + 10 * number + layer)
    return ShardResult(shard_id=shard_id, content_hash="", layers=("a", "b"), strata=strata)


def test_paired_text_is_merged_by_stratum_and_its_own_answers_by_layer() -> None:
    shards = [paired_shard(0), paired_shard(1, ["wrong"]), paired_shard(2), paired_shard(3), paired_shard(4)]
    merged = merge_blocks(shards, 3)
    assert list(merged.strata) == sorted(shards[0].strata)
    for key, stats in merged.strata.items():
        expected = merge_stats({key: shard.strata[key]} for shard in shards if key in shard.strata)[key]
        assert_close(stats, expected)
        assert stats.abs_value_count.sum() == stats.count
        assert np.array_equal(stats.abs_value, expected.abs_value)
    assert list(merged.stats) == [(0, "mlp"), (1, "mlp")]
    for (layer, site), stats in merged.stats.items():
        both = [merged.strata[layer, site, label] for label in LABELS]
        assert stats.equals(both[0].merge(both[1]))
    assert len(merged.blocks) == 3
    for block, members in zip(merged.blocks, (shards[:2], shards[2:4], shards[4:]), strict=True):
        assert list(block) == [(0, "mlp"), (1, "mlp")]
        for layer in range(2):
            own_strata = []
            for label in LABELS:
                own_strata += [shard.strata.get((layer, "mlp", label)) for shard in members]
            expected = merge_stats({layer: without_values(stats)} for stats in own_strata if stats is not None)
            assert_close(block[layer, "mlp"], expected[layer])


def test_a_block_has_the_strata_of_its_shards_with_counts_by_value() -> None:
    block = merge_stats([paired_shard(3).strata, paired_shard(4).strata])
    assert block.keys() == paired_shard(3).strata.keys()
    for key, stats in block.items():
        assert stats.equals(paired_shard(3).strata[key].merge(paired_shard(4).strata[key]))


def test_labels_are_merged_in_their_order_and_answers_after_another_prompt_left_out() -> None:
    shard = paired_shard(7)
    disordered = dict(reversed(shard.strata.items()))
    for strata in (shard.strata, disordered):
        merged = merge_strata(strata)
        for layer in range(2):
            right = shard.strata[layer, "mlp", "right"]
            wrong = shard.strata[layer, "mlp", "wrong"]
            assert merged[layer, "mlp"].equals(right.merge(wrong))


BYTES = 2 * (2048 + 4 + 4) * 8  # of a block: two layers of a histogram and two sums by unit


@pytest.mark.parametrize(("room", "fit"), [(0, 0), (BYTES - 1, 0), (BYTES, 1), (2 * BYTES - 1, 1), (3 * BYTES, 3)])
def test_blocks_beyond_the_room_in_memory_are_mapped_and_the_same(
    monkeypatch: pytest.MonkeyPatch, room: int, fit: int
) -> None:
    blocks = [paired_shard(shard, ["right"]).strata for shard in range(4)]
    expected = combine_blocks(blocks).blocks
    monkeypatch.setattr(layer_stats, "BLOCK_BYTES", room)

    def numbers_in_memory() -> list[bool]:
        stats = combine_blocks(blocks).blocks
        in_memory = []
        for block, expected_block in zip(stats, expected, strict=True):
            assert list(block) == list(expected_block)
            for key in block:
                assert block[key].equals(expected_block[key])
            in_memory.append(all(layer.unit_sum.flags.writeable for layer in block.values()))
        return in_memory

    assert numbers_in_memory() == [i < fit for i in range(4)]
    monkeypatch.setattr(tempfile, "TemporaryFile", Mock(side_effect=OSError(28, "No space left on device")))
    assert all(numbers_in_memory())


def expert_stats(seed: int) -> ExpertStats:
    rng = np.random.default_rng(seed)
    return ExpertStats(**{name: rng.integers(1, 99, 4) for name in EXPERT_FIELDS})


def test_experts_are_merged_by_layer_and_sorted() -> None:
    parts = [{2: expert_stats(0)}, {0: expert_stats(1), 2: expert_stats(2)}, {}, {2: expert_stats(3)}]
    merged = merge_stats(parts)
    assert list(merged) == [0, 2]
    for name in EXPERT_FIELDS:
        assert getattr(merged[0], name).tolist() == getattr(expert_stats(1), name).tolist()
        total = sum(getattr(expert_stats(seed), name) for seed in (0, 2, 3))
        assert getattr(merged[2], name).tolist() == total.tolist()
