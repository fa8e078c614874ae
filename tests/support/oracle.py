"""The definitions in the docstring of LayerStats, written down again in plain float64 numpy, and how to compare."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from avss_dist.stats.layer_stats import HISTOGRAM_BINS, LayerStats, ShardResult

Float64 = NDArray[np.float64]
Bool = NDArray[np.bool_]
By = Literal["value", "cut"]

LEAST_NORMAL = 2.0**-126  # of float32
FLOAT_FIELDS = (
    *("mean", "m2", "pooled_variance_sum", "unit_sum", "unit_sum_sq"),
    *("cosine_sum", "angular_sum", "relative_magnitude_sum", "input_mean", "input_m2"),
    *("first_mean", "first_m2"),
)
EXACT_FIELDS = tuple(f.name for f in fields(LayerStats) if f.name not in FLOAT_FIELDS)


def counted_by(dtype: Any) -> By:
    """How activations of a torch dtype are counted."""
    return "cut" if str(dtype).endswith("float32") else "value"


def oracle_bins(sizes: Float64) -> NDArray[np.int64]:
    """Eight bins an octave from 2**-126 up, and eight of equal width below (float32 subnormals)."""
    mantissa, exponent = np.frexp(sizes)
    within_octave = np.floor((2 * mantissa - 1) * 8)
    normal = (exponent + 126) * 8 + within_octave
    subnormal = np.floor(sizes * 2.0**129)
    return np.where(sizes < LEAST_NORMAL, subnormal, normal).astype(np.int64)


def oracle_cuts(sizes: Float64) -> Float64:
    """Eight significant bits of each, rounded down, or a multiple of 2**-133 (float32 subnormals)."""
    mantissa, exponent = np.frexp(sizes)
    normal = np.ldexp(np.floor(mantissa * 256), exponent - 8)
    subnormal = np.floor(sizes * 2.0**133) / 2.0**133
    return np.where(sizes < LEAST_NORMAL, subnormal, normal)


def sum_of_squares(values: Float64, mean: float) -> float:
    """The sum of the squared differences from a mean; 0 of no values."""
    return float(((values - mean) ** 2).sum())


def oracle_stats(
    x: Float64,
    mask: Bool,
    thresholds: Float64,
    *,
    units: bool = False,
    by: By = "cut",
    before: Float64 | None = None,
    first_tokens: bool = False,
) -> LayerStats:
    """LayerStats of x[sequences, tokens, units] where mask[sequences, tokens].

    Counted ``by`` cut as float32 activations are, or by value as those of 16 bits.
    ``before`` is the block's input. ``first_tokens`` are measured of the block site.
    """
    elements = x[mask].ravel()
    finite = elements[np.isfinite(elements)]
    sizes = np.abs(finite)
    fields: dict[str, Any] = {
        "near_zero": np.array([(sizes < t).sum() for t in thresholds], np.int64),
        "count": finite.size,
        "zero_count": int((finite == 0).sum()),
        "nonfinite_count": elements.size - finite.size,
        "histogram": np.bincount(oracle_bins(sizes), minlength=HISTOGRAM_BINS),
    }
    counted = sizes if by == "value" else oracle_cuts(sizes)
    values, counts = np.unique(counted, return_counts=True)
    fields["abs_value"] = values.astype(np.float32)
    fields["abs_value_count"] = counts
    fields["abs_value_cut"] = by == "cut"
    if finite.size:
        mean = finite.mean()
        fields |= {"mean": mean, "m2": sum_of_squares(finite, mean)}
        fields |= {"min": finite.min(), "max": finite.max(), "max_abs": sizes.max()}
    whole = []
    for rows, valid in zip(x, mask, strict=True):
        if valid.any() and np.isfinite(rows[valid]).all():
            whole.append(rows[valid])
    fields["sequence_count"] = len(whole)
    if x.shape[2] > 1:  # one unit has no variance over units
        fields["pooled_variance_sum"] = sum(float(rows.mean(0).var(ddof=1)) for rows in whole)
    is_finite = mask & np.isfinite(x).all(-1)
    if units:
        tokens = x[is_finite]
        fields |= {"unit_count": len(tokens), "unit_sum": tokens.sum(0), "unit_sum_sq": (tokens**2).sum(0)}
    if before is not None:
        both_finite = is_finite & np.isfinite(before).all(-1)
        fields |= _oracle_geometry(before[both_finite], x[both_finite])
    if first_tokens:
        fields |= _oracle_first_tokens(x, mask)
    return LayerStats(thresholds=thresholds, **fields)


def _oracle_first_tokens(x: Float64, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Return count, mean and m2 of the finite elements of the first token that counts in each row."""
    first = []
    for rows, valid in zip(x, mask, strict=True):
        first += list(rows[valid][:1])
    elements = np.concatenate([np.zeros(0), *first])
    elements = elements[np.isfinite(elements)]
    mean = mean_or_zero(elements)
    return {"first_count": elements.size, "first_mean": mean, "first_m2": sum_of_squares(elements, mean)}


def mean_or_zero(values: Float64) -> float:
    if not values.size:
        return 0.0
    return float(values.mean())


def _oracle_geometry(before: Float64, after: Float64) -> dict[str, Any]:
    input_mean = mean_or_zero(before)
    fields = {
        "input_count": before.size,
        "input_mean": input_mean,
        "input_m2": sum_of_squares(before, input_mean),
    }
    before_size = np.linalg.norm(before, axis=1)
    after_size = np.linalg.norm(after, axis=1)
    is_nonzero = (before_size > 0) & (after_size > 0)
    before = before[is_nonzero]
    after = after[is_nonzero]
    before_size = before_size[is_nonzero]
    after_size = after_size[is_nonzero]
    products = (before * after).sum(1)
    cosine = np.clip(products / (before_size * after_size), -1, 1)
    relative_magnitude = np.linalg.norm(after - before, axis=1) / before_size
    return fields | {
        "token_count": int(is_nonzero.sum()),
        "cosine_sum": cosine.sum(),
        "angular_sum": (np.arccos(cosine) / np.pi).sum(),
        "relative_magnitude_sum": relative_magnitude.sum(),
    }


def assert_close(actual: LayerStats, expected: LayerStats, rtol: float = 1e-12, angle_atol: float = 1e-12) -> None:
    """Counts, histograms and extremes are equal; sums differ by ``rtol`` of what was added up.

    ``angle_atol`` is for one token: acos is ill-conditioned near 1, where 1 - 1e-16 is an angle of 1e-8.
    """
    for name in EXACT_FIELDS:
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    rms = root_mean_square(expected.count, expected.mean, expected.m2)
    input_rms = root_mean_square(expected.input_count, expected.input_mean, expected.input_m2)
    first_rms = root_mean_square(expected.first_count, expected.first_mean, expected.first_m2)
    elements = max(expected.count, expected.input_count, 1)
    slack: dict[str, Any] = {
        "mean": rtol * rms,
        "input_mean": rtol * input_rms,
        "first_mean": rtol * first_rms,
        "unit_sum": rtol * np.sqrt(expected.unit_sum_sq * expected.unit_count),
        "cosine_sum": 1e-12 * expected.token_count,
        "angular_sum": angle_atol * expected.token_count,
    }
    roots = {"m2": rms, "input_m2": input_rms, "first_m2": first_rms, "pooled_variance_sum": expected.max_abs}
    for name in FLOAT_FIELDS:
        got = np.asarray(getattr(actual, name))
        want = np.asarray(getattr(expected, name))
        if name in roots:  # sums of squares of differences: as deviations, beside the size of what was subtracted
            got = np.sqrt(got)
            want = np.sqrt(want)
            slack[name] = 1e-14 * roots[name] * np.sqrt(elements)
        assert got.shape == want.shape, name
        limit = rtol * np.abs(want) + slack.get(name, 0.0)
        assert (np.abs(got - want) <= limit).all(), (name, got, want)


def root_mean_square(count: int, mean: float, m2: float) -> float:
    """The root of the mean square of values of which count, mean and sum of squared differences are known."""
    return float(np.sqrt(m2 / max(count, 1) + mean**2))


def assert_equal_stats(actual: Mapping[Any, LayerStats], expected: Mapping[Any, LayerStats]) -> None:
    """Statistics of the same keys are equal to the bit."""
    assert actual.keys() == expected.keys()
    for key, stats in expected.items():
        assert actual[key].equals(stats), key


def assert_same_result(actual: ShardResult, expected: ShardResult) -> None:
    """Every statistic is equal to the bit, and so is what is said of the model, but for its partition."""
    assert actual.shard_id == expected.shard_id
    assert actual.num_tokens == expected.num_tokens
    assert actual.layers == expected.layers
    assert_equal_stats(actual.stats, expected.stats)
    assert {**actual.model, "partition": ""} == {**expected.model, "partition": ""}
