"""Paired differences of results that are made up: their values, intervals and sentences, and why there is none."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from avss_dist.analysis.differences import PairedComparison, compare_results, describe_differences, difference_row
from avss_dist.core.intervention import InterventionKey
from avss_dist.stats.layer_stats import Float64
from avss_dist.stats.metrics import LOSS
from avss_dist.tasks.results import Difference, Result

RANDOM = np.random.default_rng(3)
WEIGHTS = RANDOM.integers(20, 40, 400).astype(np.float64)
HARD = RANDOM.gamma(4.0, 1.0, 400)  # nats per token, by row: what is hard for one model is hard for all


def losses(rise: float, noise: float = 0.02) -> Float64:
    """Summed losses of rows, this much higher for each token than those of the whole model."""
    return WEIGHTS * (HARD + rise + RANDOM.normal(0, noise, len(HARD)))


def result(samples: Sequence[float] | Float64, metric: str = LOSS, weights: Float64 | None = None) -> Result:
    values = np.asarray(samples, np.float64)
    return Result(metric, InterventionKey(), None, values, np.ones(len(values)) if weights is None else weights)


WHOLE = result(losses(0.0), weights=WEIGHTS)
OWN = result(losses(0.20), weights=WEIGHTS)
OTHER = result(losses(0.25), weights=WEIGHTS)


def compared(own: Result, other: Result | None, whole: Result | None = None) -> PairedComparison:
    return compare_results(own, other, whole, label="my plan.yaml", reference="b.yaml", task="perplexity:t")


def test_the_interval_is_that_of_the_mean_of_paired_differences() -> None:
    """Of many rows of equal weight, mean and t interval: the rows differ a hundred times more than the models do."""
    own = HARD + RANDOM.normal(0.05, 0.2, len(HARD))
    difference = Difference.of_metric(result(own), result(HARD))
    pairs = own - HARD
    half = 1.966 * pairs.std(ddof=1) / math.sqrt(len(pairs))
    assert difference.value == pytest.approx(pairs.mean())
    assert (difference.low, difference.high) == pytest.approx((pairs.mean() - half, pairs.mean() + half), abs=half / 20)


def test_the_difference_of_what_is_kept_has_the_sign_of_the_better_model() -> None:
    difference = Difference.of_retention(OWN, OTHER, WHOLE)
    assert difference.value == pytest.approx(math.exp(-0.20) - math.exp(-0.25), abs=0.005)
    assert 0 < difference.low < difference.value < difference.high


def test_a_model_against_itself_differs_by_nothing() -> None:
    comparison = compared(OWN, OWN, WHOLE)
    assert [difference.value for difference in comparison.differences.values()] == [0, 0]
    assert comparison.retained is not None
    assert comparison.retained.value == 0
    assert comparison.describe() == (
        "perplexity:t: my plan.yaml keeps as much of the perplexity as b.yaml "
        "(no interval: 0 of 400 samples differ, 8 are needed)."
    )


@pytest.mark.parametrize("statistic", [Difference.of_metric, Difference.of_perplexity])
def test_exchanged_models_negate_the_difference(statistic: object) -> None:
    assert callable(statistic)
    forth = statistic(OWN, OTHER)
    back = statistic(OTHER, OWN)
    assert (forth.value, forth.low, forth.high) == (-back.value, -back.high, -back.low)


def test_exchanged_models_negate_the_difference_of_what_is_kept() -> None:
    forth = Difference.of_retention(OWN, OTHER, WHOLE)
    back = Difference.of_retention(OTHER, OWN, WHOLE)
    assert (forth.value, forth.low, forth.high) == (-back.value, -back.high, -back.low)


def test_the_sentence_says_the_direction_the_interval_and_the_samples() -> None:
    better = compared(OWN, OTHER, WHOLE)
    worse = compared(OTHER, OWN, WHOLE)
    assert better.retained is not None
    points = [100 * value for value in (better.retained.value, better.retained.low, better.retained.high)]
    interval = f"95% interval {points[1]:.1f} to {points[2]:.1f}, 400 samples"
    assert better.describe() == (
        f"perplexity:t: my plan.yaml keeps {points[0]:.1f} points more of the perplexity than b.yaml ({interval})."
    )
    assert worse.describe() == (
        f"perplexity:t: my plan.yaml keeps {points[0]:.1f} points less of the perplexity than b.yaml ({interval})."
    )


def test_without_a_whole_model_the_sentence_is_about_the_metric() -> None:
    sentence = compared(OWN, OTHER).describe()
    assert sentence.startswith("perplexity:t: the perplexity of my plan.yaml is ")
    assert " lower than that of b.yaml (95% interval " in sentence


def test_a_difference_whose_interval_has_zero_may_be_chance() -> None:
    same = result(losses(0.20, noise=0.5), weights=WEIGHTS)
    assert compared(same, OWN, WHOLE).describe().endswith(" That may be chance.")
    assert "chance" not in compared(OTHER, OWN, WHOLE).describe()


def test_few_questions_with_other_answers_have_no_interval() -> None:
    answers = np.arange(200) % 2
    other = answers.copy()
    other[:5] = 1 - other[:5]
    comparison = compared(result(other, "acc"), result(answers, "acc"))
    columns = comparison.columns("acc")
    assert columns["difference"] == pytest.approx(other.mean() - answers.mean())
    assert math.isnan(columns["difference_low"])
    assert columns["difference_note"] == "5 of 200 samples differ, 8 are needed"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (result(np.ones(11)), "it has 12 samples, and b.yaml 11"),
        (None, "b.yaml has no loss there"),
        (result(np.full(12, np.nan)), "their values of loss are 1 and nan"),
    ],
)
def test_what_cannot_be_paired_has_a_reason_and_no_difference(other: Result | None, says: str) -> None:
    comparison = compared(result(np.ones(12)), other)
    columns = comparison.columns(LOSS)
    assert columns["difference"] is None
    assert columns["difference_note"] == says
    assert comparison.describe() == f"perplexity:t: my plan.yaml is not compared with b.yaml: {says}."
    assert difference_row(comparison)["difference"] is None


def test_a_task_has_a_sentence_on_its_primary_metric_alone() -> None:
    own = [compared(result(np.ones(12), metric), result(np.zeros(12), metric)) for metric in ("mc1", "mc2", "chance")]
    (sentence,) = describe_differences(own)
    assert "mc2" in sentence
