"""Intervals: against scipy's t interval of a mean, at their boundaries, and how often they cover; and retention."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import sem, skew, t

from avss_dist.stats.intervals import bootstrap_weights, jackknife_interval, left_out_weights, why_no_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import LOSS, LOWER_IS_BETTER, retention_of


def interval_of_mean(samples: Float64, **options: float) -> Float64:
    left_out = left_out_weights(len(samples)) @ samples / (len(samples) - 1)
    return jackknife_interval(samples.mean(axis=0), left_out, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("confidence", [0.95, 0.999])
@pytest.mark.parametrize("number", [8, 32, 100])
def test_the_interval_of_a_symmetric_samples_mean_is_students(number: int, confidence: float) -> None:
    half = np.random.default_rng(number).lognormal(size=(number // 2, 3))
    samples = np.concatenate([half, -half])
    want = t.interval(confidence, number - 1, samples.mean(axis=0), sem(samples, axis=0))
    np.testing.assert_allclose(interval_of_mean(samples, confidence=confidence), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("number", [8, 31, 100])
def test_halls_transformation_of_the_ends_has_students_quantiles(number: int, sign: int) -> None:
    samples = sign * np.random.default_rng(number).lognormal(size=number)
    low, high = interval_of_mean(samples)
    degrees = (number - 1) / (1 + 2 * abs(skew(samples)))
    quantile = t.ppf(0.975, degrees)
    assert halls_transformation(samples, low) == pytest.approx(quantile, rel=1e-6)
    assert halls_transformation(samples, high) == pytest.approx(-quantile, rel=1e-6)


def halls_transformation(samples: Float64, end: float) -> float:
    """Return the distance of the mean from an end of its interval, corrected for the skew of the samples."""
    number = len(samples)
    c = skew(samples, bias=False) / 3
    u = (samples.mean() - end) / samples.std(ddof=1)
    cubic = u + c * u**2 + c**2 * u**3 / 3
    return number**0.5 * (cubic + c / (2 * number))


@pytest.mark.parametrize(
    ("scale", "transform"),
    [("log", np.log), ("logit", lambda p: np.log(p / (1 - p)))],
    ids=["log", "logit"],
)
def test_a_scale_transforms_the_values_and_the_ends(scale: str, transform: Callable[[Float64], Float64]) -> None:
    rng = np.random.default_rng(3)
    value = rng.uniform(0.4, 0.6, 5)
    left_out = rng.uniform(0.4, 0.6, (9, 5))
    low, high = jackknife_interval(value, left_out, scale=scale)
    expected = jackknife_interval(transform(value), transform(left_out))
    np.testing.assert_allclose([transform(low), transform(high)], expected, rtol=1e-9)
    assert (low > 0).all()
    assert (low < value).all()
    assert (value < high).all()


def test_fewer_than_eight_units_have_no_interval() -> None:
    samples = np.random.default_rng(0).normal(size=(8, 2))
    of_eight = interval_of_mean(samples)
    assert np.isfinite(of_eight).all()
    of_seven = interval_of_mean(samples[:7])
    assert np.isnan(of_seven).all()
    of_none = jackknife_interval(np.array(0.0), np.zeros((0,)))
    assert of_none.shape == (2,)


def test_units_that_are_alike_have_an_interval_without_width() -> None:
    low, high = jackknife_interval(np.array(0.5), np.full(8, 0.5), scale="log")
    assert low == 0.5
    assert high == 0.5


@pytest.mark.parametrize("shards", [8, 9])
def test_there_is_no_reason_where_shards_are_enough(shards: int) -> None:
    assert why_no_interval(shards) is None


@pytest.mark.parametrize(("shards", "counted"), [(1, "1 shard, 8"), (7, "7 shards, 8")])
def test_the_reason_for_no_interval_has_the_number_of_shards(shards: int, counted: str) -> None:
    reason = why_no_interval(shards)
    assert reason is not None
    assert reason.startswith(f"No interval: {counted} are needed")


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0])
def test_a_value_without_logarithm_takes_the_interval_of_its_column_alone(bad: float) -> None:
    value = np.full(2, 0.5)
    left_out = np.random.default_rng(1).uniform(0.4, 0.6, (8, 2))
    left_out[3, 0] = bad
    low, high = jackknife_interval(value, left_out, scale="log")
    assert np.isnan(low[0])
    assert np.isnan(high[0])
    assert low[1] < 0.5 < high[1]


@pytest.mark.parametrize("number", [101, 250, 1000])
def test_many_units_are_left_out_in_a_hundred_groups(number: int) -> None:
    weights = left_out_weights(number)
    assert weights.shape == (100, number)
    is_left_out = weights == 0
    times_left_out = is_left_out.sum(axis=0)
    assert (times_left_out == 1).all()
    sizes = is_left_out.sum(axis=1)
    assert np.ptp(sizes) <= 1


@pytest.mark.parametrize("number", [101, 250, 1000])
def test_a_hundred_groups_have_about_the_interval_of_single_units(number: int) -> None:
    weights = left_out_weights(number)
    samples = np.random.default_rng(number).normal(size=number)
    means = weights @ samples / weights.sum(axis=1)
    low, high = jackknife_interval(samples.mean(), means)
    students_low, students_high = t.interval(0.95, number - 1, samples.mean(), sem(samples))
    assert high - low == pytest.approx(students_high - students_low, rel=0.25)


def test_a_bootstrap_draws_as_many_as_there_are_and_the_same_every_time() -> None:
    weights = bootstrap_weights(7)
    assert weights.shape == (1000, 7)
    assert (weights.sum(axis=1) == 7).all()
    np.testing.assert_array_equal(weights, bootstrap_weights(7))


@pytest.mark.parametrize("number", [8, 16])
def test_intervals_of_ratios_cover_from_eight_units_on(number: int) -> None:
    """400 draws of a ratio of sums with lognormal numerators: percentiles of the bootstrap cover 87% at eight."""
    rng = np.random.default_rng(0)
    numerator, denominator = rng.lognormal(sigma=0.5, size=(2, 400, number))
    ratios_without = []
    for i in range(number):
        rest_of_numerator = np.delete(numerator, i, axis=1).sum(axis=1)
        rest_of_denominator = np.delete(denominator, i, axis=1).sum(axis=1)
        ratios_without.append(rest_of_numerator / rest_of_denominator)
    without = np.stack(ratios_without)
    ratios = numerator.sum(1) / denominator.sum(1)
    low, high = jackknife_interval(ratios, without, scale="log")
    assert 0.92 <= share_that_covers_one(low, high) <= 0.99


def test_percentiles_of_the_bootstrap_of_ratios_cover_less() -> None:
    rng = np.random.default_rng(0)
    numerator, denominator = rng.lognormal(sigma=0.5, size=(2, 400, 8))
    weights = bootstrap_weights(8)
    resampled = (weights @ numerator.T) / (weights @ denominator.T)
    low, high = np.quantile(resampled, [0.025, 0.975], axis=0)
    assert share_that_covers_one(low, high) < 0.91


def share_that_covers_one(low: Float64, high: Float64) -> float:
    """Return the share of intervals that cover the true ratio, which is 1."""
    is_covered = (low <= 1) & (high >= 1)
    return is_covered.mean()


BEFORE = np.array([2.0, 0.5, 0.0])
AFTER = np.array([4.0, 0.25, 1.0])


def test_of_a_loss_the_perplexities_are_compared() -> None:
    assert retention_of(LOSS, BEFORE, AFTER) == pytest.approx(np.exp(BEFORE) / np.exp(AFTER), rel=1e-12)


@pytest.mark.parametrize("form", ["{}", "{},none", "group/{}", "group/{},none", "a/b/{},strict-match"])
def test_less_is_better_for_some_metrics_of_the_harness_and_more_for_the_others(form: str) -> None:
    for name in LOWER_IS_BETTER:
        assert retention_of(form.format(name), BEFORE, AFTER).tolist() == [0.5, 2.0, 0.0]
    for name in ("acc", "exact_match", "perplexity_gain"):
        assert retention_of(form.format(name), BEFORE, AFTER).tolist() == [2.0, 0.5, np.inf]


def test_nothing_of_nothing_is_not_a_number_and_no_warning(recwarn: pytest.WarningsRecorder) -> None:
    nothing = np.zeros(1)
    assert np.isnan(retention_of("acc", nothing, nothing)).all()
    assert np.isnan(retention_of("ter", nothing, nothing)).all()
    assert retention_of(LOSS, np.array([1e4]), nothing) == np.inf
    assert not recwarn.list
