"""Retentions and their intervals, and failed cells, for which a command is run again only where that can help."""

from __future__ import annotations

import errno
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from avss_dist.analysis.verdict import judgement, lacks_interval
from avss_dist.core.errors import BatchTooLarge, as_failure
from avss_dist.core.intervention import NO_INTERVENTION, InterventionKey
from avss_dist.core.names import LOSS
from avss_dist.evaluation.session import Retention, failure
from avss_dist.stats.intervals import jackknife_interval
from avss_dist.stats.layer_stats import Float64
from avss_dist.tasks.task import Result


def result(samples: Float64, metric: str = LOSS, weight: float = 1.0) -> Result:
    weights = np.full(len(samples), weight)
    return Result(metric, InterventionKey(), None, samples * weight, weights)


def losses(number: int) -> tuple[Float64, Float64]:
    rng = np.random.default_rng(number)
    before = rng.normal(3, 0.5, number)
    return before, before + rng.lognormal(-1, 0.5, number)


@pytest.mark.parametrize("number", [8, 50])
def test_what_is_kept_of_a_loss_has_the_interval_of_the_mean_of_paired_changes(number: int) -> None:
    before, after = losses(number)
    kept = Retention.of(result(before, weight=255), result(after, weight=255))
    change = before - after
    low, high = jackknife_interval(change.mean(), (change.sum() - change) / (number - 1))
    assert (kept.value, kept.low, kept.high) == pytest.approx((*np.exp([change.mean(), low, high]),))
    few = Retention.of(result(before[:7]), result(after[:7]))
    assert 0 < few.value < 1 and not few.has_interval


@pytest.mark.parametrize(("lost", "known"), [(0, False), (7, False), (8, True), (30, True)])
def test_an_accuracy_needs_eight_answers_that_change(lost: int, known: bool) -> None:
    before, after = np.ones(100), np.ones(100)
    before[80:] = 0
    after[80:] = 0
    after[:lost] = 0
    kept = Retention.of(result(before, "acc"), result(after, "acc"))
    assert kept.value == pytest.approx((80 - lost) / 80) and kept.has_interval == known
    assert not known or kept.low < kept.value < kept.high < 1


@pytest.mark.parametrize("after", [np.zeros(40), np.full(40, np.nan), np.ones(39)], ids=["nothing", "NaN", "fewer"])
def test_what_has_no_logarithm_has_no_interval(after: Float64) -> None:
    assert not Retention.of(result(np.ones(40), "acc"), result(after, "acc")).has_interval


def test_without_an_interval_the_claim_is_undecided() -> None:
    none = {"score": "avss", "retention": 0.95, "retention_low": math.nan, "retention_high": math.nan}
    known = none | {"retention_low": 0.93, "retention_high": 0.97}
    assert "undecided" in judgement(none) and "8 samples differ" in judgement(none) and lacks_interval([none])
    assert judgement(known) == "the claim holds" and not lacks_interval([known])
    assert "nothing is kept" in judgement(none | {"retention": 0.0})


# Failed cells


CELL: Any = SimpleNamespace(
    task="perplexity:text.txt", checkpoint=SimpleNamespace(name="model"), intervention=NO_INTERVENTION.without(7)
)


@pytest.mark.parametrize(
    "error", [IndexError("index 7 is out of range"), KeyError("layer"), TypeError("x"), OSError("y")]
)
def test_a_mistake_of_the_code_or_the_plan_stays_one(error: Exception) -> None:
    told = failure([(CELL, as_failure(error))])
    assert told.hint is None and "perplexity:text.txt of model without layers 7" in told.message


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (ConnectionResetError("reset by peer"), "Run the same command again."),
        (TimeoutError("timed out"), "Run the same command again."),
        (MemoryError("no memory"), "Run the same command again."),
        (OSError(errno.ENOSPC, "No space left"), "Free some space and run the same command again."),
        (BatchTooLarge("It is too large.", "Lower `batch_size`."), "Lower `batch_size`."),
    ],
)
def test_a_failure_that_can_pass_is_tried_again(error: Exception, hint: str) -> None:
    assert failure([(CELL, as_failure(error))]).hint == hint
